"""What every sparse autoencoder gives back and how it keeps its books."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


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


class SAE(nn.Module, ABC):
    """What every architecture offers to training, evaluation and export.

    All work on activations that are already scaled by their layer's norm factor.

    Attributes:
        d_model: width of the residual stream.
        d_sae: number of latents.
        k: active latents per row, at most or on average.
    """

    d_model: int
    d_sae: int
    k: int

    @abstractmethod
    def encode(self, x: Float[Tensor, "batch d_model"]) -> SparseLatents:
        """Return the active latents."""

    @abstractmethod
    def decode(self, latents: SparseLatents) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction."""

    @abstractmethod
    def decode_dense(
        self, latents: Float[Tensor, "*batch d_sae"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction from dense latents."""

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "batch d_model"],
        total_variance: Float[Tensor, ""],
        dead: Bool[Tensor, "d_sae"],
    ) -> SAEOutput:
        """Return reconstruction, latents and loss terms of a training batch."""

    @abstractmethod
    def directions(self) -> Float[Tensor, "d_sae d_model"]:
        """Return the decoder, one latent's direction a row."""

    @abstractmethod
    def project_gradient(self) -> None:
        """Called between backward and clipping."""

    @abstractmethod
    def normalize_decoder(self) -> None:
        """Called after the optimiser's step."""
