"""What all sparse autoencoders share: weights, decoding, and the interface of a training step."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Required, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groupsae.runtime.errors import UserError, check_choice
from groupsae.sae.checks import check_count, is_number
from groupsae.sae.kernels.dispatch import kernels_of
from groupsae.sae.layers import BIASES, LayerMaps
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

    def dense(self, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of `encode` with all zeros written out."""
        zeros = self.acts.new_zeros(*self.acts.shape[:-1], d_sae)
        return zeros.scatter_(-1, self.indices, self.acts)


class GlobalBatch(NamedTuple):
    """What a training step must know beyond its own rows of the batch."""

    total_variance: Float[Tensor, ""]  # sum over the batches of all processes of |x - mean|^2
    dead: Int[Tensor, "dead"]  # latents that have not fired for long
    progress: float = 1.0  # share of the training that is done, for schedules of sparsity
    share: float | Float[Tensor, ""] = 1.0  # of the rows of all processes that this process has
    all_sum: AllSum = no_reduce  # returns the sum of a tensor over all processes
    sizes: Sequence[int] = ()  # rows of each layer, one after the other; for `SAE.maps`


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
    layer_bias: str
    layer_rank: int
    layers: Sequence[int] | None
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
        layer_bias: `shared`, or `per_layer`: each of several layers has its own b_dec and b_enc.
        layer_rank: rank of each layer's own maps before the encoder and after the decoder; 0:
            none.
        layers: the group that it serves; those of one layer, or of none, have nothing of their
            own.
        generator: random generator for the initial weights; None: torch's default.

    Attributes:
        maps: what each layer has of its own. `encode` and `decode` leave it out: use `at(layer)`.

    Raises:
        UserError: not exactly one of `expansion` and `d_sae` is given, or it leaves no latent;
            there is no such `layer_bias` or `layer_rank`.
    """

    terms: ClassVar[tuple[str, ...]]  # names of the losses that `forward` can return
    normalized: tuple[str, ...] = ("W_dec",)  # parameters that `normalize_decoder` changes
    kept_wide: ClassVar[float]  # float32 tensors [batch, d_sae] that wait for the backward pass
    b_enc: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        expansion: float | None = None,
        d_sae: int | None = None,
        tied: bool = True,
        layer_bias: str = "shared",
        layer_rank: int = 0,
        layers: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_sae = d_model, _width(d_model, expansion, d_sae)
        check_choice("sae.layer_bias", layer_bias, BIASES)
        if not isinstance(layer_rank, int) or not 0 <= layer_rank <= d_model:
            raise UserError(
                f"sae.layer_rank is {layer_rank!r}; it must be an integer from 0 to the {d_model} "
                "dimensions of an activation, such as 8."
            )
        decoder = self._directions(generator)
        self.W_enc = nn.Parameter(decoder.clone() if tied else self._directions(generator))
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.own_biases, self.layer_rank = layer_bias == "per_layer", layer_rank
        self.maps: LayerMaps | None = None
        if layers is not None and len(layers) > 1 and (self.own_biases or layer_rank):
            self.maps = LayerMaps(
                layers=layers,
                d_model=d_model,
                d_sae=self.d_sae,
                own_biases=self.own_biases,
                rank=layer_rank,
                generator=generator,
            )

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
        """Return the decoder, one latent's direction a row.

        The rows have unit norm, but for those of `at` where `grow_latents` cannot take it.
        """
        return self.W_dec.detach()

    # ---- layers that have something of their own --------------------------------------------

    @property
    def own(self) -> str:
        """Return what each layer has of its own, as in `, own biases, rank 8`; empty: nothing."""
        if self.maps is None:
            return ""
        biases = ", own biases" if self.own_biases else ""
        return biases + (f", rank {self.layer_rank}" if self.layer_rank else "")

    @torch.no_grad()
    def at(self, layer: int) -> "SAE":
        """Return the plain SAE that this one is on a layer: itself, if layers have nothing own.

        W_enc (I + A B)^T, W_dec (I + C D) and both biases with their offsets. The norms of decoder
        rows go into the latents where `grow_latents` can do that; weights that do not change are
        not copied.
        """
        if self.maps is None:
            return self
        own = self.maps.of(layer)
        folded = copy.deepcopy(
            self, {id(each): each for each in (self.W_enc, self.W_dec, self.maps)}
        )
        folded.maps = None
        if own.A is not None and own.B is not None and own.C is not None and own.D is not None:
            folded.W_enc = nn.Parameter(self.W_enc + self.W_enc @ own.B.T @ own.A.T)
            folded.W_dec = nn.Parameter(self.W_dec + self.W_dec @ own.C @ own.D)
        if own.b_dec is not None and own.b_enc is not None:
            folded.b_dec.add_(own.b_dec)
            folded.shift_pre_acts(own.b_enc)
        if own.C is not None and folded.grow_latents(norms := folded.W_dec.norm(dim=1)):
            folded.W_dec.div_(norms.unsqueeze(1))
        return folded

    def shift_pre_acts(self, offset: Float[Tensor, "d_sae"]) -> None:
        """Change the biases so that all pre-activations grow by an offset."""
        self.b_enc.add_(offset)

    def grow_latents(self, factors: Float[Tensor, "d_sae"]) -> bool:
        """Multiply all latents by factors; return False where that would change which are active.

        Then nothing was changed.
        """
        return False

    def pre_acts_of(
        self, x: Float[Tensor, "batch d_model"], batch: GlobalBatch
    ) -> Float[Tensor, "batch d_sae"]:
        """Return the pre-activations of a training batch."""
        if self.maps is None:
            return self.pre_acts(x)
        pre_acts = self.pre_acts(self.maps.enter(x, batch.sizes, self.b_dec))
        return self.maps.shift(pre_acts, batch.sizes, self.W_enc)

    def x_hat_of(
        self,
        y: Float[Tensor, "batch *prefix d_model"],
        batch: GlobalBatch,
        *,
        frozen: bool = False,
    ) -> Float[Tensor, "batch *prefix d_model"]:
        """Return the reconstruction of a training batch for its latents times the decoder.

        `frozen`: neither bias nor maps are trained by it.
        """
        if self.maps is not None:
            y = self.maps.leave(y, batch.sizes, frozen=frozen)
        return y + (self.b_dec.detach() if frozen else self.b_dec)

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
        gradients (paper, section 3.3). And what `maps_flops` adds.
        """
        return 10 * self.d_model * self.d_sae + self.maps_flops(self.d_sae)

    def maps_flops(self, touched: int, decoded: int = 1) -> int:
        """Return the FLOPs per token that the maps add to a training step.

        12 d r for each product with a low-rank map: 4 forward, and 8 for its three gradients; and
        the encoder's gradient of its input, 2 d for each of the latents `touched`. `decoded`
        reconstructions are mapped back. Own biases take none.
        """
        if self.maps is None or self.layer_rank == 0:
            return 0
        return self.d_model * (12 * self.layer_rank * (1 + decoded) + 2 * touched)

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
