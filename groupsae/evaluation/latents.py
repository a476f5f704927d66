"""How often latents fire, and on which layers of their group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

BINS_PER_DECADE = 4
SPECIFIC = 0.9  # a latent with a larger share of its firings in one layer belongs to that layer


def density_histogram(fired: Int64[np.ndarray, " d_sae"], tokens: int) -> dict[str, Any]:
    """Return the histogram of log10(fired / tokens), four bins a decade, from 1 / tokens to 1.

    Returns:
        `edges` of the bins, one more than `counts` (the last bin has both its edges), and how
        many latents `never` fired, which no bin holds.

    Raises:
        ValueError: no tokens.
    """
    if tokens < 1:
        raise ValueError("no tokens: the density is not defined")
    bins = max(math.ceil(math.log10(tokens) * BINS_PER_DECADE), 1)
    edges = np.arange(-bins, 1) / BINS_PER_DECADE
    density = np.log10(fired[fired > 0] / tokens)
    # rounding of the logarithm must not push the rarest latents out of the first bin
    counts, _ = np.histogram(density.clip(edges[0], 0.0), edges)
    never = int((fired == 0).sum())
    return {"edges": edges.tolist(), "counts": counts.tolist(), "never": never}


@dataclass(frozen=True)
class LayerProfile:
    """On which layers of a group its latents fire ("feature distribution", paper 1.4)."""

    layers: list[int]
    shares: Float64[np.ndarray, "d_sae layer"]
    """Share of each latent's firings that each layer has; all 0 for one that never fired."""

    @property
    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Return which latents fired at all."""
        return self.shares.max(1) > 0

    @property
    def mean_layers(self) -> Float64[np.ndarray, " d_sae"]:
        """Return the mean layer of each latent's firings; nan for those that never fired."""
        return np.where(self.alive, self.shares @ np.array(self.layers, float), np.nan)

    def summary(self) -> dict[str, Any]:
        """Return the profile in numbers, over the latents that fired; None if none did.

        - mean_max_share = mean of the largest share that one layer has;
        - specific = share of latents with more than 90 % of their firings in one layer;
          specific_to = the same by layer;
        - mean_effective_layers = mean of exp(entropy of the shares), from 1 (all firings in one
          layer) to the number of layers (spread evenly);
        - mean_layer = mean of the mean layer they fire on;
        - never = number of latents that fired on no layer.
        """
        shares = self.shares[self.alive]
        numbers: dict[str, Any] = dict.fromkeys(
            ("mean_max_share", "specific", "specific_to", "mean_effective_layers", "mean_layer")
        )
        if len(shares):
            entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(1)
            specific = shares > SPECIFIC
            numbers |= {
                "mean_max_share": float(shares.max(1).mean()),
                "specific": float(specific.any(1).mean()),
                "specific_to": specific.mean(0).tolist(),
                "mean_effective_layers": float(np.exp(entropy).mean()),
                "mean_layer": float(self.mean_layers[self.alive].mean()),
            }
        return {"layers": self.layers, **numbers, "never": len(self.shares) - len(shares)}


def layer_profile(
    fired: Int64[np.ndarray, "layer d_sae"],
    tokens: Int64[np.ndarray, " layer"],
    layers: Sequence[int],
) -> LayerProfile:
    """Return which share of its firings each latent has on each layer.

    share of layer l = (fired_l / tokens_l) / sum over layers of (fired / tokens): rates, so that
    layers with more tokens do not count for more. `fired` are tokens on which a latent was above
    zero.

    Raises:
        ValueError: a layer without tokens.
    """
    if (tokens < 1).any():
        raise ValueError(f"layers without tokens: {np.array(layers)[tokens < 1].tolist()}")
    rates = (fired / tokens[:, None]).T
    total = rates.sum(1, keepdims=True)
    return LayerProfile(list(layers), rates / np.where(total > 0, total, 1.0))
