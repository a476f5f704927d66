"""The groups that will be trained: a partition, and what becomes of the last layer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from groupsae.errors import UserError
from groupsae.grouping.partition import Partition, check_groups

LastLayer = Literal["own", "skip", "group"]


@dataclass(frozen=True)
class GroupPlan:
    """Which layers share an SAE.

    The paper leaves the last layer L-1 out of the groups and gives it an SAE of its own
    (arXiv 2410.21508, 4.1), which its count of the saving forgets; here it is one of the SAEs.

    Args:
        partition: the groups, of L layers with last_layer "group" and else of L-1.
        last_layer: "own" (an SAE of its own), "skip" (no SAE) or "group" (as any other layer).
        num_layers: L, all layers of the language model.

    Raises:
        UserError: the three do not fit together.
    """

    partition: Partition
    last_layer: LastLayer
    num_layers: int

    def __post_init__(self) -> None:
        """Check that the partition covers the layers that last_layer leaves to it."""
        check_groups(self.partition.groups, num_groupable(self.num_layers, self.last_layer))

    @property
    def saes(self) -> list[list[int]]:
        """Return the layers of each SAE, in ascending order."""
        own = [[self.num_layers - 1]] if self.last_layer == "own" else []
        return [list(group) for group in self.partition.groups] + own

    @property
    def names(self) -> list[str]:
        """Return a folder-safe name per SAE, such as `layers.0-2` or `layers.5`."""
        return [
            f"layers.{layers[0]}" + (f"-{layers[-1]}" if len(layers) > 1 else "")
            for layers in self.saes
        ]

    @property
    def hash(self) -> str:
        """Return SHA-256 in hex over last_layer and saes: equal plans train equal SAEs."""
        return hashlib.sha256(json.dumps([self.last_layer, self.saes]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` turns into an equal plan; amad etc. unrounded.

        The scores are written for the reader of the file and are computed anew on reading.
        """
        return {
            "num_layers": self.num_layers,
            "last_layer": self.last_layer,
            "rule": self.partition.rule,
            "num_groups": self.partition.num_groups,
            "groups": [list(group) for group in self.partition.groups],
            "diameters": list(self.partition.diameters),
            "amad": self.partition.amad,
            "size_weighted_amad": self.partition.size_weighted_amad,
            "max_diameter": self.partition.max_diameter,
            "saes": self.saes,
            "names": self.names,
            "hash": self.hash,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GroupPlan":
        """Return the plan that `to_json` wrote; keys that it does not know are left alone.

        Raises:
            UserError: a key is missing, or the groups were changed and no longer fit the hash.
        """
        try:
            groups, diameters = values["groups"], values["diameters"]
            partition = Partition(
                [list(group) for group in groups], list(diameters), values["rule"]
            )
            plan = cls(partition, values["last_layer"], values["num_layers"])
            recorded = values["hash"]
        except KeyError as missing:
            raise UserError(
                f"The stored groups lack {missing}: they were not written by this program. "
                f"Remove the file and let the layers be grouped anew."
            ) from missing
        if plan.hash != recorded or len(diameters) != len(groups):
            raise UserError(
                f"The stored groups {plan.saes} have hash {plan.hash[:8]}, but {recorded[:8]} "
                f"was recorded: the file was changed by hand. Give your own groups as "
                f"groups=explicit, or remove the file."
            )
        return plan


def check_last_layer(last_layer: str) -> LastLayer:
    """Return last_layer if it is one of the three.

    Raises:
        UserError: it is not.
    """
    for allowed in get_args(LastLayer):
        if last_layer == allowed:
            return allowed
    raise UserError(
        f"last_layer is {last_layer!r}: use own (an SAE of its own, as in the paper), skip (no "
        f"SAE) or group (grouped like any other layer)."
    )


def num_groupable(num_layers: int, last_layer: LastLayer) -> int:
    """Return how many layers are left to the groups.

    Raises:
        UserError: none, because the model has one layer and that is the last one.
    """
    groupable = num_layers if check_last_layer(last_layer) == "group" else num_layers - 1
    if groupable < 1:
        raise UserError(
            f"The model has {num_layers} layer and last_layer is {last_layer}: no layer is left "
            f"to group. Use last_layer=group."
        )
    return groupable
