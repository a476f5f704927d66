"""Mean and norm of each layer's activations over the calibration tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from groupsae.grouping.shares import Shares
from groupsae.runtime.errors import UserError

# Float64 values in one chunk of tokens, and so the memory of an update: 8 MiB stays in the cache
# of a CPU (measured: 48 MiB takes nearly three times as long), an accelerator wants few kernels.
CHUNK_CPU, CHUNK_ACCELERATOR = 2**20, 2**25
NO_TOKENS = (
    "No token was counted: the calibration split is empty, all padding or all zero vectors. "
    "Give it more documents (a larger calibration_fraction)."
)


class Moments(NamedTuple):
    """Per layer, float64.

    Attributes:
        mean: mean activation.
        rms_norm: sqrt(mean ||x||^2). Activations divided by it have mean squared norm 1
            (arXiv 2410.21508, appendix A).
        mean_norm: mean ||x||, by which the reference code divides.
        mean_square: mean x_i^2 of each dimension i; they add up to rms_norm^2.
        mean_direction: mean x / ||x||.
    """

    mean: Float[Tensor, "layer d_model"]
    rms_norm: Float[Tensor, " layer"]
    mean_norm: Float[Tensor, " layer"]
    mean_square: Float[Tensor, "layer d_model"]
    mean_direction: Float[Tensor, "layer d_model"]

    def shares(self) -> Shares:
        """Return what makes up the squared norm of each layer."""
        squared = self.rms_norm.square()
        largest, dimension = self.mean_square.max(dim=1)
        values = (
            self.mean.square().sum(dim=1) / squared,
            largest / squared,
            dimension,
            self.mean_direction.square().sum(dim=1),
            (self.mean_norm / self.rms_norm).square(),
        )
        return Shares(*(value.cpu().numpy() for value in values))


class LayerMoments(Metric):
    """The moments of each layer's activations.

    Sums and counts are float64, so neither the batch size nor the number of ranks matters.
    """

    is_differentiable = False
    full_state_update = False
    sum: Tensor
    sum_of_squares: Tensor
    sum_of_norms: Tensor
    sum_by_dimension: Tensor  # of squares
    sum_of_directions: Tensor
    count: Tensor

    def __init__(self, *, num_layers: int, d_model: int) -> None:
        super().__init__()
        self.num_layers, self.d_model = num_layers, d_model
        zeros = torch.zeros(num_layers, d_model, dtype=torch.float64)
        self.add_state("sum", zeros, dist_reduce_fx="sum")
        self.add_state("sum_of_squares", zeros[:, 0].clone(), dist_reduce_fx="sum")
        self.add_state("sum_of_norms", zeros[:, 0].clone(), dist_reduce_fx="sum")
        self.add_state("sum_by_dimension", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("sum_of_directions", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        acts: Float[Tensor, "layer token d_model"],
        mask: Bool[Tensor, " token"] | None = None,
    ) -> None:
        """Add tokens; those with mask False are padding and are left out.

        Raises:
            UserError: an activation is not finite.
        """
        acts = acts if mask is None else acts[:, mask]
        total, squares = torch.zeros_like(self.sum), torch.zeros_like(self.sum_of_squares)
        norms = torch.zeros_like(squares)
        by_dimension, directions = torch.zeros_like(total), torch.zeros_like(total)
        tokens = tokens_per_chunk(acts)
        for first in range(0, acts.shape[1], tokens):
            # A copy in float64, since reductions with dtype=float64 take five times as long.
            x = acts[:, first : first + tokens].double()
            total += x.sum(dim=1)
            squared = x.square()
            of_tokens = squared.sum(dim=2)
            squares += of_tokens.sum(dim=1)
            lengths = of_tokens.sqrt()
            norms += lengths.sum(dim=1)
            by_dimension += squared.sum(dim=1)
            inverse = 1 / torch.where(lengths > 0, lengths, 1.0)
            directions += (inverse[:, None, :] @ x).squeeze(1)
        check_finite(squares.isfinite())
        self.sum += total
        self.sum_of_squares += squares
        self.sum_of_norms += norms
        self.sum_by_dimension += by_dimension
        self.sum_of_directions += directions
        self.count += acts.shape[1]

    def compute(self) -> Moments:
        """Return the moments, summed over the ranks; `moments` keeps their shapes.

        Raises:
            UserError: no token was counted.
        """
        if self.count == 0:
            raise UserError(NO_TOKENS)
        return Moments(
            self.sum / self.count,
            (self.sum_of_squares / self.count).sqrt(),
            self.sum_of_norms / self.count,
            self.sum_by_dimension / self.count,
            self.sum_of_directions / self.count,
        )

    def moments(self) -> Moments:
        """Return the moments; of a model with one layer `compute` returns scalars."""
        vectors, norms = (self.num_layers, self.d_model), (self.num_layers,)
        shapes = (vectors, norms, norms, vectors, vectors)
        return Moments(*(x.reshape(s) for x, s in zip(self.compute(), shapes, strict=True)))


def tokens_per_chunk(acts: Float[Tensor, "layer token d_model"]) -> int:
    """Return how many tokens fit in a chunk, also with layer x layer values for each."""
    values = CHUNK_CPU if acts.device.type == "cpu" else CHUNK_ACCELERATOR
    num_layers, _, d_model = acts.shape
    return max(1, values // (num_layers * max(num_layers, d_model)))


def check_finite(finite: Bool[Tensor, " layer"]) -> None:
    """Raise UserError naming the first layer that is not finite."""
    if not finite.all():
        layer = int((~finite).int().argmax())
        raise UserError(
            f"The activations of layer {layer} contain NaN or infinity: they must be finite. Run "
            "the language model in float32 or bfloat16 instead of float16, and check that its "
            "files are complete."
        )
