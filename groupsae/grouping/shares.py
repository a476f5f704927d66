"""What the activations of a layer consist of, and whether that misleads the angles."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from groupsae.runtime.commands import command

# A share above one half outweighs all of the rest. For the mean this has a meaning: the cosine of
# two tokens, in one layer or in two alike, is then on average more than 0.5 before it depends on
# the tokens.
DOMINATES = 0.5
MOST_LAYERS = 0.5


class Shares(NamedTuple):
    """Per layer, over the calibration tokens.

    Attributes:
        mean_share: |E x|^2 / E|x|^2, the share of the mean in the squared norm.
        dimension_share: max_i E x_i^2 / E|x|^2, the share of the largest dimension.
        dimension: which dimension that is.
        token_cosine: |E x/|x||^2, the mean cosine of two tokens. Equal to the share of the mean
            where all norms are equal; where a few tokens of extreme norm hide the others' mean in
            that share, they do not here.
        evenness: (E|x|)^2 / E|x|^2; 1 if all norms are equal, near 0 if a few tokens hold most of
            the squared norm.
    """

    mean_share: np.ndarray
    dimension_share: np.ndarray
    dimension: np.ndarray
    token_cosine: np.ndarray
    evenness: np.ndarray

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "Shares | None":
        """Return the shares among the arrays of a file; None if it has none."""
        return cls(*(stored[name] for name in cls._fields)) if cls._fields[0] in stored else None

    def to_json(self) -> dict[str, list[float]]:
        """Return plain values."""
        return {name: values.tolist() for name, values in self._asdict().items()}


def mean_dominates(shares: Shares) -> bool:
    """Return whether uncentred angles compare means rather than tokens, at most layers."""
    return _most(_common(shares))


def _common(shares: Shares) -> np.ndarray:
    """Return at which layers the mean of all tokens, or one dimension of all, dominates."""
    everywhere = (shares.dimension_share > DOMINATES) & (shares.evenness >= 1 - DOMINATES)
    return (shares.mean_share > DOMINATES) | (shares.token_cosine > DOMINATES) | everywhere


def _most(dominated: np.ndarray) -> bool:
    return bool(np.mean(dominated) > MOST_LAYERS)


def described(shares: Shares) -> str:
    """Return the shares of the mean and of the largest dimension, as part of a sentence."""
    return (
        f"the mean has {_range(shares.mean_share)} of a layer's squared norm, the largest "
        f"dimension {_range(shares.dimension_share)} ({_names(shares.dimension)})"
    )


def advice(
    shares: Shares,
    *,
    centring: str,
    filtered: bool,
    groups: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None,
    overrides: Sequence[str],
) -> str | None:
    """Return what dominates at most of the layers, and the command to use instead.

    None if nothing does, or if the groups are the same without it.

    Args:
        shares: of all layers.
        centring: that of the run.
        filtered: tokens of extreme norm are left out already.
        groups: those of uncentred and of centred distances; None if one of them is not known.
        overrides: arguments of the command that started the run.
    """
    large, uneven = shares.dimension_share > DOMINATES, shares.evenness < 1 - DOMINATES
    found, change = [], {}
    if not filtered and _most(large & uneven):
        found.append(
            "A few tokens of extreme norm, such as attention sinks, hold most of the squared norm "
            f"at most layers; one dimension has {_range(shares.dimension_share)} of it "
            f"({_names(shares.dimension)}). The norm factors follow these tokens."
        )
        change["stream.max_norm_ratio"] = "10"
    misled = centring == "none" and groups is not None and groups[0] != groups[1]
    if groups is not None and misled and mean_dominates(shares):
        uncentred, centred = map(len, groups)
        found.append(
            "Uncentred angles compare the layers' mean activations rather than their tokens: "
            f"{described(shares)}, and the mean cosine of two tokens is "
            f"{_range(shares.token_cosine, percent=False)}. "
            f"Uncentred distances give {uncentred} group{'s' * (uncentred != 1)}, centred ones "
            + ("as many, but others." if centred == uncentred else f"{centred}.")
        )
        change["calibration.centring"] = "mean"
    if not change:
        return None
    kept = [each for each in overrides if each.lstrip("+").split("=")[0] not in change]
    changed = [f"{key}={value}" for key, value in change.items()]
    return f"{' '.join(found)} To change that:\n  {command('train', *kept, *changed)}"


def _range(values: np.ndarray, *, percent: bool = True) -> str:
    low, high = (
        f"{100 * value:.0f}" if percent else f"{value:.2f}"
        for value in (values.min(), values.max())
    )
    return (low if low == high else f"{low} to {high}") + " %" * percent


def _names(dimensions: np.ndarray) -> str:
    counts = np.bincount(dimensions)
    return f"number {counts.argmax()} at {counts.max()} of {len(dimensions)} layers"
