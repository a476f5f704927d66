"""Matryoshka BatchTopK sparse autoencoder (Bussmann et al., arXiv 2503.17547)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.runtime.errors import UserError
from groupsae.sae.base import GlobalBatch
from groupsae.sae.batchtopk import BatchTopK, BatchTopKArguments
from groupsae.sae.checks import check_share
from groupsae.sae.kernels.dense import rows_of
from groupsae.sae.sparse import Decode, Entries

PREFIXES = (0.0625, 0.125, 0.25, 0.5, 1.0)


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct on their own.

    Each prefix of the latents (the first m_1, the first m_2, ... all) reconstructs the input from
    its own active latents, and all their errors count: general features settle in the small
    prefixes and are not split up among the later latents.

    Args:
        prefixes: shares of the latents, growing, the last one 1.
        **arguments: of `BatchTopK`.

    Raises:
        UserError: the prefixes do not grow from at least one latent to all.

    >>> sae = Matryoshka(d_model=64, d_sae=1024, k=8, prefixes=[0.25, 1])
    >>> sae.sizes
    [256, 1024]
    """

    terms = ("fvu", "nested", "auxk")
    begins: Tensor  # first latent of each ring: what a prefix adds to the one before

    def __init__(
        self, *, prefixes: Sequence[float] = PREFIXES, **arguments: Unpack[BatchTopKArguments]
    ) -> None:
        super().__init__(**arguments)
        for share in prefixes:
            check_share("prefixes", share)
        self.sizes = [round(share * self.d_sae) for share in prefixes]
        grows = all(small < large for small, large in pairwise([0, *self.sizes]))
        if not self.sizes or not grows or self.sizes[-1] != self.d_sae:
            raise UserError(
                f"sae.prefixes is {list(prefixes)}; give shares of the {self.d_sae} latents that "
                "grow and end in 1, such as [0.0625,0.125,0.25,0.5,1], none of them empty."
            )
        begins = torch.tensor([0, *self.sizes[:-1]])
        self.register_buffer("begins", begins, persistent=False)

    def extra_repr(self) -> str:
        """Return the sizes, k and the number of latents of each prefix."""
        return f"{super().extra_repr()}, prefixes={self.sizes}"

    def reconstruct(
        self,
        x: Float[Tensor, "batch d_model"],
        acts: Float[Tensor, "entry"],
        entries: Entries,
        batch: GlobalBatch,
    ) -> tuple[Float[Tensor, "batch d_model"], dict[str, Float[Tensor, ""]]]:
        """Return the reconstruction by all latents, its fvu, and the sum of the others, nested."""
        rings = Decode.apply(acts, self.W_dec, self._by_ring(entries))
        prefixes = rings.unflatten(0, (len(x), len(self.sizes))).cumsum(dim=1)
        x_hats = self.x_hat_of(prefixes, batch)
        squares = (x.unsqueeze(1) - x_hats).square().sum(dim=(0, 2)) / batch.total_variance
        return x_hats[:, -1], {"fvu": squares[-1], "nested": squares[:-1].sum()}

    def _by_ring(self, entries: Entries) -> Entries:
        """Return the entries with each row split where a prefix ends.

        They are in order of row and latent.
        """
        row = rows_of(entries.starts, len(entries.latents))
        rows = torch.arange(len(entries.starts) - 1, device=row.device)
        cuts = (rows.unsqueeze(1) * self.d_sae + self.begins).flatten()
        starts = torch.searchsorted(row * self.d_sae + entries.latents, cuts)
        return entries.with_rows(torch.cat([starts, entries.starts[-1:]]))

    def maps_flops(self, touched: int, decoded: int = 1) -> int:
        """Return the FLOPs per token that the maps add, with one reconstruction per prefix."""
        return super().maps_flops(touched, decoded * len(self.sizes))
