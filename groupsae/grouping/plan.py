"""The SAEs that will be trained: a partition, the last layer, and more partitions to compare."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from groupsae.grouping.partition import Partition, check_groups
from groupsae.runtime.errors import UserError

LAST_LAYERS = ("own", "skip", "group")


class PlannedSAE(NamedTuple):
    """One SAE that will be trained.

    Attributes:
        name: folder-safe, such as `layers.0-2`, `layers.5` or `layers.5.smaller-2`.
        layers: the layers that it serves, ascending.
        width: its latents, as a share of the configured number.
    """

    name: str
    layers: list[int]
    width: float


@dataclass(frozen=True)
class GroupPlan:
    """Which layers share an SAE.

    The paper leaves the last layer L-1 out of the groups and gives it its own SAE
    (arXiv 2410.21508, 4.1), but does not count this SAE in the saving. Here it is counted.

    Args:
        partition: the groups, of L layers with last_layer "group" and else of L-1.
        last_layer: "own" (its own SAE), "skip" (no SAE) or "group" (as any other layer).
        num_layers: L, all layers of the language model.
        theta: the bound on AMAD that chose the partition; None where none did.
        others: further partitions to train (groups=all); a group that several share is trained
            once.
        smaller: numbers of groups G whose cost is matched by smaller SAEs on every layer, the
            baseline of arXiv 2410.21508, 4.2: width G/n on each of the n grouped layers.
        unserved: layers without an SAE, each its own group: imported SAEs rarely serve
            all layers.

    Raises:
        UserError: they do not fit together.
    """

    partition: Partition
    last_layer: str
    num_layers: int
    theta: float | None = None
    others: tuple[Partition, ...] = ()
    smaller: tuple[int, ...] = ()
    unserved: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the partitions cover the layers that last_layer leaves to them."""
        groupable = num_groupable(self.num_layers, self.last_layer)
        for each in self.partitions:
            check_groups(each.groups, groupable)
        check_smaller(self.smaller, groupable)

    @property
    def partitions(self) -> list[Partition]:
        """Return the chosen partition and all others."""
        return [self.partition, *self.others]

    @property
    def saes(self) -> list[list[int]]:
        """Return the layers of each SAE of the chosen partition, in ascending order."""
        served = (list(g) for g in self.partition.groups if not set(g) & set(self.unserved))
        own = [[self.num_layers - 1]] if self.last_layer == "own" else []
        return [*served, *own]

    @property
    def names(self) -> list[str]:
        """Return the name of each SAE of the chosen partition, such as `layers.0-2`."""
        return [name_of(layers) for layers in self.saes]

    @property
    def members(self) -> list[PlannedSAE]:
        """Return every SAE to train, once: the chosen partition's first."""
        groups = [*self.saes, *(list(g) for each in self.others for g in each.groups)]
        full = {name_of(group): PlannedSAE(name_of(group), group, 1.0) for group in groups}
        grouped = self.partition.num_layers
        return list(full.values()) + [
            PlannedSAE(smaller_name_of(layer, count), [layer], count / grouped)
            for count in self.smaller
            for layer in range(grouped)
        ]

    @property
    def slots(self) -> list[list[int]]:
        """Return the distinct sets of layers that the SAEs' rows are drawn from."""
        return [list(x) for x in dict.fromkeys(tuple(m.layers) for m in self.members)]

    def slots_of(self, indices: Sequence[int]) -> list[list[int]]:
        """Return those of some SAEs, which are given by their numbers in `members`."""
        needed = [self.members[i].layers for i in indices]
        return [slot for slot in self.slots if slot in needed]

    @property
    def hash(self) -> str:
        """Return SHA-256 in hex over last_layer and SAEs: equal plans train equal SAEs."""
        trained = self.members if self.others or self.smaller else self.saes
        return hashlib.sha256(json.dumps([self.last_layer, trained]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` turns into an equal plan; amad etc. unrounded.

        The scores are for the reader of the file; `from_json` computes them again.
        """
        return {
            "num_layers": self.num_layers,
            "last_layer": self.last_layer,
            "theta": self.theta,
            **self.partition.to_json(),
            "saes": self.saes,
            "names": self.names,
            "others": [each.to_json() for each in self.others],
            "smaller": list(self.smaller),
            "unserved": list(self.unserved),
            "hash": self.hash,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GroupPlan":
        """Return the plan that `to_json` wrote; unknown keys are ignored.

        Raises:
            UserError: a key is missing, or the groups were changed and no longer fit the hash.
        """
        try:
            plan = cls(
                Partition.from_json(values),
                values["last_layer"],
                values["num_layers"],
                values["theta"],
                tuple(Partition.from_json(each) for each in values["others"]),
                tuple(values["smaller"]),
                tuple(values.get("unserved", ())),
            )
            recorded = values["hash"]
        except KeyError as missing:
            raise UserError(
                f"The stored groups lack {missing}: another version of groupsae wrote them. "
                "Remove the file, and the layers are grouped again."
            ) from missing
        counts_fit = all(len(p.diameters) == len(p.groups) for p in plan.partitions)
        if plan.hash != recorded or not counts_fit:
            raise UserError(
                f"The stored groups {plan.saes} have hash {plan.hash[:8]}, but {recorded[:8]} "
                "was recorded: the file was changed by hand. Give your own groups by "
                "groups=explicit, or remove the file."
            )
        return plan


def name_of(layers: Sequence[int]) -> str:
    """Return the folder-safe name of a group's SAE: `layers.0-2`, or `layers.5` for one layer."""
    return f"layers.{layers[0]}" + (f"-{layers[-1]}" if len(layers) > 1 else "")


def smaller_name_of(layer: int, num_groups: int) -> str:
    """Return the name of a layer's smaller SAE that matches the cost of num_groups groups."""
    return f"{name_of([layer])}.smaller-{num_groups}"


def check_smaller(counts: object, groupable: int | None = None) -> None:
    """Raise UserError unless these are numbers of groups that smaller SAEs can match.

    With as many groups as layers the SAEs would be no smaller.
    """
    if isinstance(counts, str) or not isinstance(counts, Sequence):
        raise UserError(
            f"groups.smaller is {counts!r}: use chosen, or a list of numbers of groups such as "
            "[2,4], or [] for none."
        )
    most = math.inf if groupable is None else groupable - 1
    limit = "" if groupable is None else f" to {most}, below the {groupable} grouped layers"
    for count in counts:
        if not isinstance(count, int | np.integer) or not 1 <= count <= most:
            raise UserError(f"groups.smaller holds {count!r}: use integers from 1 up{limit}.")


def num_groupable(num_layers: int, last_layer: str) -> int:
    """Return how many layers are left to the groups.

    Raises:
        UserError: none, because the model has one layer and that is the last one.
    """
    groupable = num_layers if last_layer == "group" else num_layers - 1
    if groupable < 1:
        raise UserError(
            f"The model has {num_layers} layer and last_layer is {last_layer}: no layer is left "
            "to group. Use groups.last_layer=group."
        )
    return groupable
