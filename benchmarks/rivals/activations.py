"""The activations that all contenders train on: the same in every environment, from a seed."""

import hashlib

import torch
from torch import Tensor

SHAPES = {  # name -> d_model, d_sae, k, rows of a batch
    "S1": (512, 4096, 32, 2048),
    "S2": (768, 12288, 64, 2048),
}
BATCHES = 8  # distinct ones; trainers see them in turn
PARTS = 16  # directions in a row


def batches(shape: str) -> list[Tensor]:
    """Return the batches of a shape, each [rows, d_model].

    A row is the sum of 16 of 4 d_model random unit directions, drawn with the weights
    1 / sqrt(rank) so that some are frequent and some rare, with coefficients uniform in
    [0.5, 1.5], on a common mean and under noise.
    """
    d_model, _, _, rows = SHAPES[shape]
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_model, d_model, generator=rng)
    directions /= directions.norm(dim=1, keepdim=True)
    weights = torch.arange(1, 4 * d_model + 1).rsqrt().expand(rows, -1)
    mean = torch.randn(d_model, generator=rng) / d_model**0.5
    made = []
    for _ in range(BATCHES):
        chosen = torch.multinomial(weights, PARTS, generator=rng)
        sizes = 0.5 + torch.rand(rows, PARTS, generator=rng)
        x = torch.einsum("rp,rpd->rd", sizes, directions[chosen])
        made.append(x + mean + 0.1 / d_model**0.5 * torch.randn(rows, d_model, generator=rng))
    return made


def fingerprint(made: list[Tensor]) -> str:
    """Return a key of the batches, alike where only the last bits differ."""
    figures = [round(float(v), 2) for x in made for v in (x.double().sum(), x.double().norm())]
    return hashlib.sha256(repr(figures).encode()).hexdigest()[:8]
