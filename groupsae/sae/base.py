"""What every sparse autoencoder is made of, what it gives back and how it keeps its books."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groupsae.runtime.errors import UserError
from groupsae.sae.kernels.dispatch import kernels_of
from groupsae.sae.schedule import check_count, is_number
from groupsae.sae.sparse import Decode, Entries

AllSum = Callable[[Tensor], Tensor]


def same(value: Tensor) -> Tensor:
    """Return the sum over the one process that there is."""
    return value


class SparseLatents(NamedTuple):
    """Latent activations of a batch; a value of zero means not active.

    `encode` gives k a row. Where the rows of a training batch have different numbers of active
    latents, `starts` says where each row begins, and the other two have one dimension.

    Attributes:
        acts: activations, never negative (while a training step selects: pre-activations).
        indices: which latents they belong to.
        starts: None, or the first entry of each row, and the number of entries at the end.
    """

    acts: Float[Tensor, "batch k"] | Float[Tensor, "entry"]
    indices: Int[Tensor, "batch k"] | Int[Tensor, "entry"]
    starts: Int[Tensor, "bound"] | None = None

    def entries(self, d_sae: int) -> Entries:
        """Return which latents are active in which rows."""
        if self.starts is None:
            return Entries.of_rows(self.indices, d_sae)
        return Entries(self.indices, self.starts, d_sae)


class SAEOutput(NamedTuple):
    """Forward pass in training.

    Attributes:
        reconstruction: of the scaled activations.
        latents: what was active; all latents where they are dense in training.
        losses: named terms; the training loss is their sum.
    """

    reconstruction: Float[Tensor, "batch d_model"]
    latents: SparseLatents | Float[Tensor, "batch d_sae"]
    losses: dict[str, Float[Tensor, ""]]


class SAE(nn.Module, ABC):
    """f(x) = sigma(W_enc (x - b_dec) + b_enc), x_hat = W_dec f(x) + b_dec.

    Architectures differ in sigma and in what they add to the loss. All work on activations that
    are already scaled by their layer's norm factor. Weights are [d_sae, d_model] both, one latent
    a row; the decoder's rows have unit norm before and after every step; biases start at zero.

    Args:
        d_model: width of the residual stream.
        expansion: latents per dimension, d_sae = round(expansion * d_model). Give this or `d_sae`.
        d_sae: number of latents.
        tied: start the encoder as the decoder's transpose; otherwise from directions of its own.
        generator: of the initial weights; None is torch's default one.

    Raises:
        UserError: not exactly one of `expansion` and `d_sae` is given, or it leaves no latent.
    """

    terms: ClassVar[tuple[str, ...]]  # of the loss, that `forward` can give
    normalized: ClassVar[tuple[str, ...]] = ("W_dec",)  # that `normalize_decoder` changes
    kept_wide: ClassVar[float]  # float32 tensors [batch, d_sae] that wait for the backward pass

    def __init__(
        self,
        *,
        d_model: int,
        expansion: float | None = None,
        d_sae: int | None = None,
        tied: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_sae = d_model, _width(d_model, expansion, d_sae)
        decoder = self._directions(generator)
        self.W_enc = nn.Parameter(decoder.clone() if tied else self._directions(generator))
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def _directions(self, generator: torch.Generator | None) -> Tensor:
        """Return random unit vectors, one for each latent."""
        # the generator's device, not the default one: Lightning builds modules on the accelerator
        device = generator.device if generator else torch.get_default_device()
        drawn = torch.randn(self.d_sae, self.d_model, generator=generator, device=device)
        drawn = drawn.to(torch.get_default_device())
        return drawn / drawn.norm(dim=1, keepdim=True)

    # ---- inference ----------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the active latents, as many entries a row as the row with most needs."""

    def decode(self, latents: SparseLatents) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction; touches only the active rows of the decoder."""
        return self.combine(latents) + self.b_dec

    def combine(self, latents: SparseLatents) -> Float[Tensor, "batch d_model"]:
        """Return what the latents add up to, without the bias."""
        entries = latents.entries(self.d_sae)
        return Decode.apply(latents.acts.flatten(), self.W_dec, entries)

    def decode_dense(
        self, latents: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction from dense latents, any number of them active."""
        return latents @ self.W_dec + self.b_dec

    def directions(self) -> Float[Tensor, "d_sae d_model"]:
        """Return the decoder, one latent's direction a row; the rows have unit norm."""
        return self.W_dec.detach()

    # ---- training -----------------------------------------------------------------------

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "batch d_model"],
        total_variance: Float[Tensor, ""],
        dead: Int[Tensor, "dead"],
        progress: float = 1.0,
        share: float | Float[Tensor, ""] = 1.0,
        all_sum: AllSum = same,
    ) -> SAEOutput:
        """Return reconstruction, latents and loss terms of a training batch.

        Every term is this process's part of a sum over processes. The first, `fvu`, is
        sum |x - x_hat|^2 / total_variance.

        Args:
            x: scaled activations.
            total_variance: sum over the *global* batch of |x - mean|^2; with several processes
                it is more than this batch's own.
            dead: latents that have not fired for long.
            progress: share of the training that is done, for schedules of sparsity.
            share: of the global batch's rows that are in `x`.
            all_sum: returns the sum of a tensor over all processes.
        """

    def followed(self) -> list[Tensor]:
        """Return state that follows the batches, to be averaged over processes after a step."""
        return []

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient what would only change the latents' norms.

        Called between backward and clipping.
        """
        gradient = self.W_dec.grad
        if gradient is not None:
            kernels_of(self.W_dec).project_rows(gradient, self.W_dec)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make every latent's direction a unit vector again; called after the step."""
        kernels_of(self.W_dec).normalize_rows(self.W_dec)

    # ---- cost ---------------------------------------------------------------------------

    def training_flops(self) -> int:
        """Return the FLOPs per token of a training step: dense, 10 d n.

        Encoder forward and weight gradient 2 d n each, decoder forward and its two gradients as
        well (paper section 3.3).
        """
        return 10 * self.d_model * self.d_sae

    def inference_flops(self) -> int:
        """Return the FLOPs per token of encoding and decoding, at most: 4 d n."""
        return 4 * self.d_model * self.d_sae


def _width(d_model: int, expansion: float | None, d_sae: int | None) -> int:
    if (expansion is None) == (d_sae is None):
        raise UserError(
            f"sae.expansion is {expansion} and sae.d_sae is {d_sae}: give one of them and null "
            "for the other, such as sae.expansion=null sae.d_sae=16384."
        )
    if expansion is not None:
        if not is_number(expansion) or round(expansion * d_model) < 1:
            raise UserError(f"sae.expansion is {expansion!r}; it must be above 0, such as 16.")
        return round(expansion * d_model)
    assert d_sae is not None
    check_count("d_sae", d_sae)
    return d_sae


def linear_pre_acts(
    x: Float[Tensor, "batch d_model"], sae: SAE, bias: Float[Tensor, "d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return W_enc (x - b_dec) + bias.

    b_dec goes through the bias, which saves the backward pass a full-size product.
    """
    return F.linear(x, sae.W_enc, bias - sae.W_enc @ sae.b_dec)


def firings(
    latents: SparseLatents | Float[Tensor, "batch d_sae"], d_sae: int
) -> tuple[Bool[Tensor, "d_sae"], Int[Tensor, ""]]:
    """Return which latents fired in a batch, and how often all of them did."""
    if isinstance(latents, Tensor):
        return (latents > 0).any(dim=0), (latents > 0).sum()
    active = (latents.acts > 0).flatten()
    # a sum, not an assignment by mask, which would wait for the device to know its size
    times = torch.zeros(d_sae, dtype=torch.int32, device=active.device)
    times.scatter_add_(0, latents.indices.flatten(), active.int())
    return times > 0, active.sum()


def active_latents(acts: Float[Tensor, "batch d_sae"]) -> SparseLatents:
    """Return the latents above zero of dense ones, as many columns as the fullest row needs."""
    most = max(1, int((acts > 0).sum(dim=1).max())) if len(acts) else 1
    return SparseLatents(*acts.topk(most, dim=1, sorted=False))
