"""What a partition of the layers is, and the figures that are read off it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groupsae.runtime.errors import UserError

Distances = npt.NDArray[np.float64]

ROUNDING = 1e-9  # what sums over ranks in another order may leave; far below any real angle


@dataclass(frozen=True)
class Partition:
    """Contiguous groups that cover layers 0..n-1, in order, with their diameters.

    Make one with `build_partition`, which checks the groups.

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
        """Return plain values; `from_json` reads groups, diameters and rule, the rest is shown."""
        return {
            "rule": self.rule,
            "num_groups": self.num_groups,
            "groups": [list(group) for group in self.groups],
            "diameters": [known(diameter) for diameter in self.diameters],
            "amad": known(self.amad),
            "size_weighted_amad": known(self.size_weighted_amad),
            "max_diameter": known(self.max_diameter),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Partition":
        """Return the partition that `to_json` wrote; raises KeyError if a key is missing."""
        diameters = [math.nan if d is None else d for d in values["diameters"]]
        return cls([list(group) for group in values["groups"]], diameters, values["rule"])

    def group_of(self, layer: int) -> int:
        """Return the index of the group that holds this layer.

        Raises:
            UserError: the layer is not in the partition.
        """
        for index, group in enumerate(self.groups):
            if layer in group:
                return index
        raise UserError(
            f"Layer {layer} is in no group: the partition covers layers 0 to "
            f"{self.num_layers - 1}. Ask for one of those."
        )


def known(value: float) -> float | None:
    """Return a value, or None for the NaN of distances that were never measured."""
    return None if math.isnan(value) else value


def amad(distances: npt.ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """Return the average maximum angular distance, (1/G) sum_g max_{i,j in g} d(i, j).

    Each group counts once whatever its size, and a group of one layer counts 0 (arXiv
    2410.21508, 3.2). It scores groups and must not be minimised over them: the best score goes
    to one giant group beside singletons. Not rounded, unlike the reference code. The groups may
    be any non-empty sets of layers.

    Raises:
        UserError: the distances are not a distance matrix, or a group is empty or out of range.

    >>> amad([[0.0, 0.1, 0.4], [0.1, 0.0, 0.3], [0.4, 0.3, 0.0]], [[0, 1], [2]])
    0.05
    """
    square = validate_distances(distances)
    for layer in (layer for group in groups for layer in group):
        if not 0 <= layer < len(square):
            raise UserError(_unknown_layer(layer, len(square)))
    if not groups or not all(map(len, groups)):
        raise UserError(f"The groups {_plain(groups)} hold an empty list: remove it.")
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


def check_groups(groups: Sequence[Sequence[int]], num_layers: int) -> list[list[int]]:
    """Return the groups in ascending order if they cut layers 0..num_layers-1 into runs.

    Raises:
        UserError: a layer is unknown, missing or in two groups, or a group is not a run.
    """
    ordered = sort_groups(groups)
    layers = [layer for group in ordered for layer in group]
    for layer in layers:
        if layer >= num_layers:
            raise UserError(_unknown_layer(layer, num_layers))
    missing = sorted(set(range(num_layers)) - set(layers))
    if missing:
        raise UserError(
            f"The groups {ordered} leave out {_layers(missing)}: every layer from 0 to "
            f"{num_layers - 1} must be in exactly one group. Add {_layers(missing)} to a "
            f"neighbouring group, or as a group of its own."
        )
    return ordered


def sort_groups(groups: object) -> list[list[int]]:
    """Return the groups in ascending order, after the checks that need no number of layers.

    Raises:
        UserError: a group is empty, not a run of integers from 0 up, or overlaps with another.
    """
    if isinstance(groups, str) or not isinstance(groups, Sequence) or not groups:
        raise UserError(f"The groups {groups!r} are no lists: write them like [[0, 1], [2, 3]].")
    owner: dict[int, Sequence[int]] = {}
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Sequence) or not group:
            raise UserError(
                f"The group {group!r} is not a list with a layer in it: write groups like "
                f"[[0, 1], [2, 3]]."
            )
        for layer in group:
            if not isinstance(layer, int | np.integer) or isinstance(layer, bool) or layer < 0:
                raise UserError(
                    f"The group {group!r} holds {layer!r}: layers are whole numbers from 0 up."
                )
            if int(layer) in owner:
                raise UserError(
                    f"Layer {layer} is listed twice, in {list(owner[int(layer)])} and "
                    f"{list(group)}: every layer must be in exactly one group. Remove it from one."
                )
            owner[int(layer)] = group
    ordered = sorted(sorted(int(layer) for layer in group) for group in groups)
    for group in ordered:
        between = sorted(set(range(group[0], group[-1])) - set(group))
        if between:
            raise UserError(
                f"The group {group} skips {_layers(between)}: a group must be a run of "
                f"neighbouring layers. Add {_layers(between)} to it or split it there."
            )
    return ordered


def validate_distances(distances: npt.ArrayLike) -> Distances:
    """Return the distances as an exactly symmetric float64 matrix with a zero diagonal.

    A single number counts as the 1 x 1 matrix, because torchmetrics hands that out for one layer.

    Raises:
        UserError: not square, not finite, outside [0, 1], not symmetric, or a non-zero diagonal.
    """
    square = np.atleast_2d(np.asarray(distances, dtype=np.float64))
    if square.ndim != 2 or square.shape[0] != square.shape[1] or square.size == 0:
        raise UserError(
            f"The layer distances have shape {list(square.shape)}: they must be a square "
            f"matrix, one row and one column per layer."
        )
    mend = "Measure them anew."
    if not np.isfinite(square).all():
        row, column = np.argwhere(~np.isfinite(square))[0]
        raise UserError(
            f"The distance between layers {row} and {column} is {square[row, column]}: "
            f"distances must be finite. {mend}"
        )
    if square.min() < 0 or square.max() > 1:
        row, column = np.argwhere((square < 0) | (square > 1))[0]
        raise UserError(
            f"The distance between layers {row} and {column} is {square[row, column]}: angles "
            f"in fractions of pi lie in [0, 1]. Divide radians by pi, or degrees by 180."
        )
    if np.abs(np.diagonal(square)).max() > ROUNDING:
        layer = int(np.diagonal(square).argmax())
        raise UserError(
            f"The distance of layer {layer} from itself is {square[layer, layer]}: it must "
            f"be 0. {mend}"
        )
    gaps = np.abs(square - square.T)
    if gaps.max() > ROUNDING:
        row, column = np.unravel_index(int(gaps.argmax()), gaps.shape)
        raise UserError(
            f"The distance from layer {row} to {column} is {square[row, column]} and back "
            f"{square[column, row]}: the matrix must be symmetric. If only one half is filled, "
            f"add its transpose."
        )
    symmetric = (square + square.T) / 2
    np.fill_diagonal(symmetric, 0.0)
    return symmetric


def _diameter(square: Distances, group: Sequence[int]) -> float:
    return float(square[np.ix_(group, group)].max())


def _plain(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(group) for group in groups]


def _layers(layers: list[int]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))


def _unknown_layer(layer: int, num_layers: int) -> str:
    return (
        f"Layer {layer} is in a group, but there are {num_layers} layers to group, 0 to "
        f"{num_layers - 1}. Remove it from the groups."
    )
