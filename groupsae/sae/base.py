"""What all sparse autoencoders share: weights, decoding, and the interface of a training step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Required, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groupsae.runtime.errors import UserError
from groupsae.sae.checks import check_count, is_number
from groupsae.sae.kernels.dispatch import kernels_of
from groupsae.sae.sparse import Decode, Entries

AllSum = Callable[[Tensor], Tensor]


def no_reduce(value: Tensor) -> Tensor:
    """Return the sum over all processes when there is only one: the value."""
    return value


class SparseLatents(NamedTuple):
    """Latent activations of a batch; a value of zero means not active.

    `encode` returns k per row. Where the rows of a training batch have different numbers of active
    latents, `starts` holds the first entry of each row, and the other two have one dimension.
    """

    # never negative (while a training step selects: pre-activations)
    acts: Float[Tensor, "batch k"] | Float[Tensor, "entry"]
    indices: Int[Tensor, "batch k"] | Int[Tensor, "entry"]  # the latents they belong to
    # the first entry of each row, and the number of entries at the end
    starts: Int[Tensor, "bound"] | None = None

    def entries(self, d_sae: int) -> Entries:
        """Return which latents are active in which rows."""
        if self.starts is None:
            return Entries.of_rows(self.indices, d_sae)
        return Entries(self.indices, self.starts, d_sae)


class GlobalBatch(NamedTuple):
    """What a training step must know beyond its own rows of the batch."""

    total_variance: Float[Tensor, ""]  # sum over the batches of all processes of |x - mean|^2
    dead: Int[Tensor, "dead"]  # latents that have not fired for long
    progress: float = 1.0  # share of the training that is done, for schedules of sparsity
    share: float | Float[Tensor, ""] = 1.0  # of the rows of all processes that this process has
    all_sum: AllSum = no_reduce  # returns the sum of a tensor over all processes


class SAEOutput(NamedTuple):
    """Result of a training step's forward pass.

    Each loss is this process's part of a sum over processes; the training loss is their sum.
    """

    reconstruction: Float[Tensor, "batch d_model"]  # of the scaled activations
    latents: SparseLatents | Float[Tensor, "batch d_sae"]  # dense if they are dense in training
    losses: dict[str, Float[Tensor, ""]]  # named terms


class Size(TypedDict, total=False):
    """The arguments of `SAE`, which every kind passes on: so that editors know them."""

    d_model: Required[int]
    expansion: float | None
    d_sae: int | None
    tied: bool
    generator: torch.Generator | None


class SAE(nn.Module, ABC):
    """f(x) = sigma(W_enc (x - b_dec) + b_enc), x_hat = W_dec f(x) + b_dec.

    Architectures differ in sigma and in what they add to the loss. All work on activations that
    are already scaled by their layer's norm factor. Both weights are [d_sae, d_model], one latent
    a row; the decoder's rows have unit norm before and after every step; biases start at zero.

    Args:
        d_model: width of the residual stream.
        expansion: latents per dimension, d_sae = round(expansion * d_model). Give this or `d_sae`.
        d_sae: number of latents.
        tied: start the encoder as the decoder's transpose; otherwise from random directions.
        generator: random generator for the initial weights; None: torch's default.

    Raises:
        UserError: not exactly one of `expansion` and `d_sae` is given, or it leaves no latent.
    """

    terms: ClassVar[tuple[str, ...]]  # names of the losses that `forward` can return
    normalized: ClassVar[tuple[str, ...]] = ("W_dec",)  # tensors that `normalize_decoder` changes
    kept_wide: ClassVar[float]  # float32 tensors [batch, d_sae] that wait for the backward pass
    b_enc: Tensor

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

    def extra_repr(self) -> str:
        """Return the sizes, and what decides how many latents are active."""
        return f"d_model={self.d_model}, d_sae={self.d_sae}"

    # ---- inference ----------------------------------------------------------------------

    def pre_acts(self, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """Return W_enc (x - b_dec) + b_enc.

        b_dec goes through the bias, which saves the backward pass a full-size product.
        """
        return F.linear(x, self.W_enc, self.b_enc - self.W_enc @ self.b_dec)

    @abstractmethod
    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the active latents, as many entries a row as the row with most needs."""

    def decode(self, latents: SparseLatents) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction; reads only the active rows of the decoder."""
        acts, entries = latents.acts.flatten(), latents.entries(self.d_sae)
        return Decode.apply(acts, self.W_dec, entries) + self.b_dec

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
    def forward(self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch) -> SAEOutput:
        """Return reconstruction, latents and losses of scaled activations.

        The first loss, `fvu`, is sum |x - x_hat|^2 / total_variance.
        """

    def running_state(self) -> list[Tensor]:
        """Return state that training updates, to be averaged over processes after a step."""
        return []

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient the part that would only change the latents' norms.

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

        2 d n each: the encoder's forward and weight gradient, the decoder's forward and its two
        gradients (paper, section 3.3).
        """
        return 10 * self.d_model * self.d_sae

    def inference_flops(self) -> int:
        """Return the most FLOPs per token that encoding and decoding take: 4 d n."""
        return 4 * self.d_model * self.d_sae


def _width(d_model: int, expansion: float | None, d_sae: int | None) -> int:
    if (expansion is None) == (d_sae is None):
        raise UserError(
            f"sae.expansion is {expansion} and sae.d_sae is {d_sae}: give one of them and null "
            "for the other, such as sae.expansion=null sae.d_sae=16384."
        )
    if expansion is None:
        check_count("d_sae", d_sae)
        assert d_sae is not None
        return d_sae
    if not is_number(expansion) or round(expansion * d_model) < 1:
        raise UserError(f"sae.expansion is {expansion!r}; it must be above 0, such as 16.")
    return round(expansion * d_model)


def ramp(start: float, end: float, warmup: float, progress: float) -> float:
    """Return a value that goes from start to end, linearly, over a share `warmup` of training."""
    if progress >= warmup:
        return end
    return start + (end - start) * progress / warmup


def firings(
    latents: SparseLatents | Float[Tensor, "batch d_sae"], d_sae: int
) -> tuple[Bool[Tensor, "d_sae"], Int[Tensor, ""]]:
    """Return which latents fired in a batch, and the number of all firings."""
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
