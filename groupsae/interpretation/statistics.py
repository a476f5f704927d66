"""How often, how strongly and where the latents of one SAE fire on one layer."""

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.interpretation.firings import Firings, Peaks

BINS = 64
LEAST_EXPONENT = -24  # of the histogram's end: activations below 2^-30 share a bin
UNIT = 2.0**-28  # of the sums of activations: integers add up to the same in any order


class Statistics:
    """Counts, sums and histogram of each latent of an SAE on one layer.

    The histogram of a latent has 64 bins of equal width from 0 to 2^exponent, the smallest power
    of two above its activations. When a higher one comes, bins are added up in pairs: that is
    exact, so the result does not depend on the order of the text.

    Attributes:
        fired: tokens with an activation above zero, by text (0: explain, 1: score).
        windows: windows with such a token, by text.
        mass: sum of the activations, by text, in multiples of `UNIT`.
        exponent: end of the histogram as a power of two.
        histogram: firings in each bin, of both texts.
    """

    fired: Int[Tensor, "text d_sae"]
    windows: Int[Tensor, "text d_sae"]
    mass: Int[Tensor, "text d_sae"]
    exponent: Int[Tensor, "d_sae"]
    histogram: Int[Tensor, "d_sae bins"]

    def __init__(self, d_sae: int, texts: int, device: torch.device) -> None:
        self.fired = torch.zeros(texts, d_sae, dtype=torch.int64, device=device)
        self.windows = torch.zeros_like(self.fired)
        self.mass = torch.zeros_like(self.fired)
        self.exponent = torch.full((d_sae,), LEAST_EXPONENT, device=device)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)

    def update(self, firings: Firings, peaks: Peaks, text: int) -> None:
        """Add a part of a text."""
        latents, d_sae = firings.latents, len(self.exponent)
        self.fired[text] += torch.bincount(latents, minlength=d_sae)
        self.windows[text] += torch.bincount(peaks.latents, minlength=d_sae)
        self.mass[text].index_add_(0, latents, (firings.values.double() / UNIT).round().long())
        _, needed = torch.frexp(firings.values)  # value < 2^needed
        reached = self.exponent.clone()
        self._widen(reached.scatter_reduce_(0, latents, needed.long(), "amax"))
        scaled = torch.ldexp(firings.values, (6 - self.exponent[latents]).int())  # 64 bins = 2^6
        places = latents * BINS + scaled.long()
        self.histogram += torch.bincount(places, minlength=d_sae * BINS).view(d_sae, BINS)

    def _widen(self, exponent: Int[Tensor, "d_sae"]) -> None:
        """Let the histograms end at these powers of two, none of them below those of today."""
        grown = (exponent > self.exponent).nonzero().squeeze(1)
        if len(grown):
            steps = (exponent - self.exponent)[grown].clamp(max=BINS - 1)
            bins = torch.arange(BINS, device=grown.device) >> steps.unsqueeze(1)
            folded = torch.zeros_like(self.histogram[grown])
            self.histogram[grown] = folded.scatter_add_(1, bins, self.histogram[grown])
            self.exponent.copy_(exponent)

    def merge(self, other: "Statistics") -> None:
        """Add the counts of another part of the text."""
        widest = torch.maximum(self.exponent, other.exponent)
        self._widen(widest)
        other._widen(widest)
        for name in ("fired", "windows", "mass", "histogram"):
            getattr(self, name).add_(getattr(other, name))

    def tensors(self) -> dict[str, Tensor]:
        """Return all counts, by name."""
        return {name: getattr(self, name) for name in self.__annotations__}
