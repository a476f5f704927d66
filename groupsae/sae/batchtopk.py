"""BatchTopK sparse autoencoder (Bussmann, Leask, Nanda, arXiv 2412.06410)."""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.sae.base import GlobalBatch, SAEOutput, SparseLatents, active_latents
from groupsae.sae.checks import check_share
from groupsae.sae.kernels.dispatch import top_k
from groupsae.sae.topk import TopK, TopKArguments


class BatchTopKArguments(TopKArguments, total=False):
    """The arguments of `BatchTopK`, for kinds that pass them on."""

    threshold_momentum: float


class BatchTopK(TopK):
    """In training the k * batch largest latents of a batch are active.

    So a row has k on average, and as many as it needs. Afterwards a row must not depend on its
    neighbours: `encode` keeps the latents above `threshold`, a running mean of the smallest
    positive latent that training kept in a batch (section 3 of the paper has the mean over
    batches). With several processes, each takes the largest of its part of the batch, and the
    threshold is the mean of theirs.

    Args:
        threshold_momentum: momentum of the threshold's running mean.
        **arguments: of `TopK`.

    >>> sae = BatchTopK(d_model=64, d_sae=1024, k=8)
    >>> sae.decode(sae.encode(torch.randn(10, 64))).shape
    torch.Size([10, 64])
    """

    threshold: Tensor

    def __init__(
        self, *, threshold_momentum: float = 0.95, **arguments: Unpack[TopKArguments]
    ) -> None:
        super().__init__(**arguments)
        check_share("threshold_momentum", threshold_momentum)
        self.threshold_momentum = threshold_momentum
        self.register_buffer("threshold", torch.zeros(()))  # 0: training has not begun

    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the latents above the threshold."""
        pre_acts = self.pre_acts(x)
        return active_latents(pre_acts.relu() * (pre_acts > self.threshold))

    def select(self, pre_acts: Float[Tensor, "batch d_sae"], k: int) -> SparseLatents:
        """Return the k * batch largest pre-activations of the batch, in order of rows."""
        rows, width = pre_acts.shape
        starts = torch.arange(rows + 1, device=pre_acts.device) * width
        values, place, starts = _largest(pre_acts.flatten(), k * rows, starts)
        return SparseLatents(values, place % width, starts)

    def narrow(self, candidates: SparseLatents, k: int) -> SparseLatents:
        """Return the k * batch largest of the pre-activations that `select` returned."""
        assert candidates.starts is not None
        count = k * (len(candidates.starts) - 1)
        values, place, starts = _largest(candidates.acts, count, candidates.starts)
        return SparseLatents(values, candidates.indices[place], starts)

    def forward(self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch) -> SAEOutput:
        """Return the same as `TopK`; training updates the threshold."""
        output = super().forward(x, batch)
        if self.training:
            assert isinstance(output.latents, SparseLatents)
            self._update_threshold(output.latents.acts)
        return output

    @torch.no_grad()
    def _update_threshold(self, acts: Float[Tensor, "entry"]) -> None:
        """Move the threshold towards the smallest positive of the kept activations."""
        if acts.numel() == 0:  # the token filters left no row of the step
            return
        smallest = torch.where(acts > 0, acts, torch.inf).min()
        slow = self.threshold_momentum * self.threshold + (1 - self.threshold_momentum) * smallest
        moved = torch.where(self.threshold == 0, smallest, slow)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    def running_state(self) -> list[Tensor]:
        """Return the threshold."""
        return [self.threshold]


def _largest(
    values: Float[Tensor, "value"], count: int, starts: Int[Tensor, "bound"]
) -> tuple[Float[Tensor, "entry"], Int[Tensor, "entry"], Int[Tensor, "bound"]]:
    """Return the `count` largest values in their order, their places, and where rows start.

    Row r has the values starts[r] <= i < starts[r + 1].
    """
    place = top_k(values.unsqueeze(0), count)[1].squeeze(0).sort().values
    return values[place], place, torch.searchsorted(place, starts)
