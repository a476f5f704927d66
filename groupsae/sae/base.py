"""What every sparse autoencoder gives back and how it keeps its books."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class SparseLatents(NamedTuple):
    """Latent activations of a batch, k a row; a value of zero means not active.

    Attributes:
        acts: activations, never negative.
        indices: which latents they belong to.
    """

    acts: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


class SAEOutput(NamedTuple):
    """Forward pass in training.

    Attributes:
        reconstruction: of the scaled activations.
        latents: what was active.
        losses: named terms; the training loss is their sum.
    """

    reconstruction: Float[Tensor, "batch d_model"]
    latents: SparseLatents
    losses: dict[str, Float[Tensor, ""]]
