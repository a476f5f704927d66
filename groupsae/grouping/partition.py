"""A partition of the layers into groups, its figures, and the checks of groups and distances."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from groupsae.runtime.errors import UserError

Distances = npt.NDArray[np.float64]
Cosines = npt.NDArray[np.float64]

# FVU lost by sharing, as a share of that of one SAE per layer, for each unit of V, and its error
# as a share of the loss on models that it was not fitted on: docs/predicting-loss.md
LOSS_PER_VARIANCE = 2.4
LOSS_ERROR = (0.08, 0.48)
ROUNDING = 1e-9  # of sums over ranks in another order; far below any real angle


@dataclass(frozen=True)
class Partition:
    """Contiguous groups that cover layers 0..n-1, in order, with their diameters.

    `build_partition` makes one and checks the groups.

    Args:
        groups: layer indices of each group, ascending.
        diameters: largest distance within each group, in fractions of pi; 0 for one layer alone,
            NaN where the distances were never measured (null in JSON).
        rule: the rule that made the groups.
        variances: angular variance V_g of each group (`angular_variance`); empty where it was
            not measured.

    >>> distances = [[0.0, 0.1, 0.4], [0.1, 0.0, 0.3], [0.4, 0.3, 0.0]]
    >>> part = groupsae.partition(distances, num_groups=2)
    >>> part.num_groups, part.diameters, part.amad
    (2, [0.1, 0.0], 0.05)
    """

    groups: list[list[int]]
    diameters: list[float]
    rule: str
    variances: list[float] = field(default_factory=list)

    @property
    def num_groups(self) -> int:
        """Return G."""
        return len(self.groups)

    @property
    def num_layers(self) -> int:
        """Return n, the number of layers that are grouped."""
        return sum(map(len, self.groups))

    @property
    def amad(self) -> float:
        """Return AMAD(G) = (1/G) sum_g D_g in fractions of pi (arXiv 2410.21508, 3.2)."""
        return sum(self.diameters) / len(self.diameters)

    @property
    def size_weighted_amad(self) -> float:
        """Return sum_g |g| D_g / n: a layer's mean diameter, which singletons cannot dilute."""
        weighted = (len(g) * d for g, d in zip(self.groups, self.diameters, strict=True))
        return sum(weighted) / self.num_layers

    @property
    def variance(self) -> float:
        """Return V = sum_g |g| V_g / n, the mean angular variance of a layer's group, or NaN."""
        if not self.variances:
            return math.nan
        weighted = (len(g) * v for g, v in zip(self.groups, self.variances, strict=True))
        return sum(weighted) / self.num_layers

    @property
    def predicted_loss(self) -> float:
        """Return 2.4 V, the predicted FVU lost as a share of the FVU of one SAE per layer.

        For SAEs without parts of their own for each layer. NaN where V is not known.
        """
        return LOSS_PER_VARIANCE * self.variance

    @property
    def max_diameter(self) -> float:
        """Return the largest distance between two layers that share a group."""
        return float(np.max(self.diameters))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads rule, groups, diameters and variances only."""
        return {
            "rule": self.rule,
            "num_groups": self.num_groups,
            "groups": [list(group) for group in self.groups],
            "diameters": [none_if_nan(diameter) for diameter in self.diameters],
            "variances": self.variances,
            "amad": none_if_nan(self.amad),
            "size_weighted_amad": none_if_nan(self.size_weighted_amad),
            "max_diameter": none_if_nan(self.max_diameter),
            "variance": none_if_nan(self.variance),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Partition":
        """Return the partition that `to_json` wrote; raises KeyError if a key is missing."""
        diameters = [math.nan if d is None else d for d in values["diameters"]]
        groups = [list(group) for group in values["groups"]]
        return cls(groups, diameters, values["rule"], list(values.get("variances", ())))


def none_if_nan(value: float) -> float | None:
    """Return a value, or None for the NaN of distances that were never measured."""
    return None if math.isnan(value) else value


def amad(distances: npt.ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """Return the average maximum angular distance, (1/G) sum_g max_{i,j in g} d(i, j).

    Each group counts once whatever its size, and a group of one layer counts 0 (arXiv
    2410.21508, 3.2). It scores groups and must not be minimised over them: the best score goes to
    one giant group and singletons. Not rounded, unlike in the reference code.

    Raises:
        UserError: as `build_partition`.

    >>> amad([[0.0, 0.1, 0.4], [0.1, 0.0, 0.3], [0.4, 0.3, 0.0]], [[0, 1], [2]])
    0.05
    """
    return build_partition(distances, groups, "given").amad


def build_partition(
    distances: npt.ArrayLike,
    groups: Sequence[Sequence[int]],
    rule: str,
    cosines: npt.ArrayLike | None = None,
) -> Partition:
    """Return the partition of these groups, sorted, with its diameters and variances.

    Raises:
        UserError: as `check_groups`, `validate_distances` and `mean_cosines`.
    """
    square = validate_distances(distances)
    ordered = check_groups(groups, len(square))
    diameters = [float(square[np.ix_(group, group)].max()) for group in ordered]
    cosines = mean_cosines(square, cosines)
    return Partition(ordered, diameters, rule, [angular_variance(cosines, g) for g in ordered])


def angular_variance(cosines: Cosines, group: Sequence[int]) -> float:
    """Return V_g = (1/2) mean_{i,j in g} (1 - cos(x_i, x_j)), i = j included.

    Half of the variance of the layers' unit vectors around their mean, averaged over tokens:
    (1 - |mean unit vector|^2) / 2. 0 for one layer, at most 1/2.
    """
    return float((1 - cosines[np.ix_(group, group)]).mean() / 2)


def mean_cosines(distances: Distances, cosines: npt.ArrayLike | None) -> Cosines:
    """Return the layers' mean cosines; where none were measured, the cosines of the mean angles.

    Raises:
        UserError: they are not as many as the distances, or not in [-1, 1].
    """
    if cosines is None:
        return np.cos(np.pi * distances)
    square = np.atleast_2d(np.asarray(cosines, dtype=np.float64))
    if square.shape != distances.shape or not (np.abs(square) <= 1 + ROUNDING).all():
        raise UserError(
            f"The mean cosines have shape {list(square.shape)} and lie in [{square.min():g}, "
            f"{square.max():g}]: they must lie in [-1, 1], one for each of the "
            f"{list(distances.shape)} distances."
        )
    return square


def check_groups(groups: object, num_layers: int | None = None) -> list[list[int]]:
    """Return the groups in ascending order if they split the layers from 0 on into runs.

    Args:
        groups: lists of layers.
        num_layers: number of layers that they must cover; None: as many as they contain.

    Raises:
        UserError: they are no such lists, or a layer is unknown, missing, in two groups, or apart
            from its neighbours.
    """
    try:
        ordered = sorted(sorted(map(index, group)) for group in groups)  # type: ignore[attr-defined]
    except TypeError:
        ordered = []
    if not ordered or not all(ordered):
        raise UserError(
            f"The groups are {groups!r}: write lists of layers, which are integers from 0 up, "
            "such as [[0, 1], [2, 3]]."
        )
    layers = [layer for group in ordered for layer in group]
    total = len(layers) if num_layers is None else num_layers
    for layer, expected in zip_longest(layers, range(total)):
        if layer != expected:
            here, due = ("the end" if x is None else f"layer {x}" for x in (layer, expected))
            raise UserError(
                f"The groups {ordered} must be runs of neighbouring layers, with each layer from "
                f"0 to {total - 1} in exactly one: {due} is expected, not {here}."
            )
    return ordered


def validate_distances(distances: npt.ArrayLike) -> Distances:
    """Return the distances as an exactly symmetric float64 matrix with a zero diagonal.

    A single number counts as the 1 x 1 matrix: torchmetrics returns that for one layer.

    Raises:
        UserError: not square, not finite, outside [0, 1], not symmetric, or a non-zero diagonal.
    """
    square = np.atleast_2d(np.asarray(distances, dtype=np.float64))
    if square.ndim != 2 or square.shape[0] != square.shape[1] or square.size == 0:
        raise UserError(
            f"The layer distances have shape {list(square.shape)}: they must be a square "
            "matrix, one row and one column per layer."
        )
    for wrong, rule in (
        (
            ~((square >= 0) & (square <= 1)),  # NaN too
            "angles in fractions of pi lie in [0, 1]. Divide radians by pi, or degrees by 180",
        ),
        (
            np.diag(np.abs(np.diagonal(square)) > ROUNDING),
            "the distance of a layer from itself must be 0. Measure them again",
        ),
        (
            np.abs(square - square.T) > ROUNDING,
            "the matrix must be symmetric. If only one half is filled, add its transpose",
        ),
    ):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"The distance between layers {row} and {column} is {square[row, column]}, and "
                f"back {square[column, row]}: {rule}."
            )
    symmetric = (square + square.T) / 2
    np.fill_diagonal(symmetric, 0.0)
    return symmetric
