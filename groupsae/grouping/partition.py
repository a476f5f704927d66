"""A partition of the layers into groups, its figures, and the checks of groups and distances."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groupsae.runtime.errors import UserError

Distances = npt.NDArray[np.float64]

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
    """

    groups: list[list[int]]
    diameters: list[float]
    rule: str

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
    def max_diameter(self) -> float:
        """Return the largest distance between two layers that share a group."""
        return float(np.max(self.diameters))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads rule, groups and diameters only."""
        return {
            "rule": self.rule,
            "num_groups": self.num_groups,
            "groups": [list(group) for group in self.groups],
            "diameters": [none_if_nan(diameter) for diameter in self.diameters],
            "amad": none_if_nan(self.amad),
            "size_weighted_amad": none_if_nan(self.size_weighted_amad),
            "max_diameter": none_if_nan(self.max_diameter),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Partition":
        """Return the partition that `to_json` wrote; raises KeyError if a key is missing."""
        diameters = [math.nan if d is None else d for d in values["diameters"]]
        return cls([list(group) for group in values["groups"]], diameters, values["rule"])


def none_if_nan(value: float) -> float | None:
    """Return a value, or None for the NaN of distances that were never measured."""
    return None if math.isnan(value) else value


def amad(distances: npt.ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """Return the average maximum angular distance, (1/G) sum_g max_{i,j in g} d(i, j).

    Each group counts once whatever its size, and a group of one layer counts 0 (arXiv
    2410.21508, 3.2). It scores groups and must not be minimised over them: the best score goes to
    one giant group and singletons. Not rounded, unlike in the reference code. The groups may be
    any non-empty sets of layers.

    Raises:
        UserError: the distances are not a distance matrix, or a group is empty or out of range.

    >>> amad([[0.0, 0.1, 0.4], [0.1, 0.0, 0.3], [0.4, 0.3, 0.0]], [[0, 1], [2]])
    0.05
    """
    square = validate_distances(distances)
    _check_range([layer for group in groups for layer in group], len(square))
    if not groups or not all(map(len, groups)):
        raise UserError(f"The groups {groups} hold an empty list: remove it.")
    diameters = [_diameter(square, group) for group in groups]
    return sum(diameters) / len(diameters)


def build_partition(
    distances: npt.ArrayLike, groups: Sequence[Sequence[int]], rule: str
) -> Partition:
    """Return the partition of these groups, sorted, with diameters taken from the distances.

    Raises:
        UserError: the groups overlap, leave a gap, are not contiguous or do not fit the matrix.
    """
    square = validate_distances(distances)
    ordered = check_groups(groups, len(square))
    return Partition(ordered, [_diameter(square, group) for group in ordered], rule)


def _diameter(square: Distances, group: Sequence[int]) -> float:
    return float(square[np.ix_(group, group)].max())


def check_groups(groups: Sequence[Sequence[int]], num_layers: int) -> list[list[int]]:
    """Return the groups in ascending order if they split layers 0..num_layers-1 into runs.

    Raises:
        UserError: a layer is unknown, missing or in two groups, or a group is not a run.
    """
    ordered = sort_groups(groups)
    layers = {layer for group in ordered for layer in group}
    _check_range(layers, num_layers)
    missing = _listed(set(range(num_layers)) - layers)
    if missing:
        raise UserError(
            f"The groups {ordered} leave out {missing}: every layer from 0 to {num_layers - 1} "
            f"must be in exactly one group. Add {missing} to a neighbouring group, or as a group "
            "of its own."
        )
    return ordered


def sort_groups(groups: object) -> list[list[int]]:
    """Return the groups in ascending order, after the checks that need no number of layers.

    Raises:
        UserError: a group is empty, not a run of integers from 0 up, or overlaps with another.
    """
    if not _is_list(groups) or not all(_is_list(g) and all(map(_is_layer, g)) for g in groups):  # type: ignore[attr-defined]
        raise UserError(
            f"The groups are {groups!r}: write lists of layers, which are integers from 0 up, "
            "such as [[0, 1], [2, 3]]."
        )
    ordered = sorted(sorted(int(layer) for layer in group) for group in groups)  # type: ignore[attr-defined]
    layer, times = Counter(layer for group in ordered for layer in group).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"Layer {layer} is listed {times} times in the groups {ordered}: every layer must be "
            "in exactly one group. List it once."
        )
    for group in ordered:
        skipped = _listed(set(range(group[0], group[-1])) - set(group))
        if skipped:
            raise UserError(
                f"The group {group} skips {skipped}: a group must be a run of neighbouring "
                f"layers. Add {skipped} to it, or split it there."
            )
    return ordered


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _is_layer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _check_range(layers: Sequence[int] | set[int], num_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"Layer {layer} is in a group, but there are {num_layers} layers to group, 0 to "
                f"{num_layers - 1}. Remove it from the groups."
            )


def _listed(layers: set[int]) -> str:
    """Return layers for a message; an empty string for none."""
    numbers = ", ".join(map(str, sorted(layers)))
    return numbers and f"layer{'s' * (len(layers) > 1)} {numbers}"


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
        (~np.isfinite(square), "distances must be finite. Measure them again"),
        (
            (square < 0) | (square > 1),
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
