"""How the groups are chosen: one small class per option of conf/groups."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from groupsae.grouping.partition import (
    ROUNDING,
    Cosines,
    Distances,
    Partition,
    build_partition,
    check_groups,
    mean_cosines,
    validate_distances,
)
from groupsae.grouping.plan import LAST_LAYERS, GroupPlan, check_smaller, num_groupable
from groupsae.grouping.rules import (
    RULES,
    check_num_groups,
    check_theta,
    choose,
    curve,
    partition,
)
from groupsae.runtime.errors import UserError, check_choice


@dataclass(frozen=True, kw_only=True)
class Choice(ABC):
    """A way to choose the groups; an option defines `_name` and `_partition`.

    Args:
        last_layer: "own" (its own SAE), "skip" (no SAE) or "group" (as any other layer).

    Raises:
        UserError: an argument is out of its range.
    """

    last_layer: str = "own"

    def __post_init__(self) -> None:
        """Check the arguments, as far as that needs no number of layers."""
        check_choice("last_layer", self.last_layer, LAST_LAYERS)

    @property
    def label(self) -> str:
        """Return a short name, safe for folders: equal labels make equal plans on a model."""
        return self._name() + ("" if self.last_layer == "own" else f"-last-{self.last_layer}")

    def check(self, num_layers: int) -> None:
        """Raise UserError if this choice does not fit a model with num_layers layers.

        Called before any long work.
        """
        self._check(num_groupable(num_layers, self.last_layer))

    def plan(self, distances: npt.ArrayLike, cosines: npt.ArrayLike | None = None) -> GroupPlan:
        """Return the plan for these [L, L] distances of all layers (fractions of pi).

        Args:
            distances: mean angles of all layers.
            cosines: their mean cosines; None: those of the mean angles.

        Raises:
            UserError: the distances are no distance matrix, the cosines do not fit them, or as
                `check`.
        """
        square = validate_distances(distances)
        self.check(len(square))
        groupable = num_groupable(len(square), self.last_layer)
        kept = np.s_[:groupable, :groupable]
        return self._plan(square[kept], mean_cosines(square, cosines)[kept], len(square))

    def _plan(self, grouped: Distances, cosines: Cosines, num_layers: int) -> GroupPlan:
        """Return the plan from the distances of the layers that are grouped."""
        theta = getattr(self, "theta", None)
        return GroupPlan(self._partition(grouped, cosines), self.last_layer, num_layers, theta)

    @abstractmethod
    def _name(self) -> str: ...

    @abstractmethod
    def _partition(self, distances: Distances, cosines: Cosines) -> Partition: ...

    def _check(self, groupable: int) -> None:  # noqa: B027 - most choices fit any model
        pass


@dataclass(frozen=True, kw_only=True)
class ByAmad(Choice):
    """The fewest groups whose AMAD is below theta (arXiv 2410.21508, 3.2).

    Args:
        theta: bound on AMAD, in fractions of pi, between 0 and 1.
        rule: how the layers are split into G groups: a key of `RULES` in rules.py.
    """

    theta: float = 0.2
    rule: str = "complete"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_theta(self.theta)
        check_choice("rule", self.rule, RULES)

    def _name(self) -> str:
        return f"amad-{self.theta}{_unless_complete(self.rule)}"

    def _partition(self, distances: Distances, cosines: Cosines) -> Partition:
        return choose(distances, self.theta, self.rule, cosines)


@dataclass(frozen=True, kw_only=True)
class Published(ByAmad):
    """The groups of the reference code: AMAD below theta over its own linkage of matrix rows.

    Args:
        theta: bound on AMAD, in fractions of pi, between 0 and 1.
    """

    rule: str = field(default="published", init=False)

    def _name(self) -> str:
        return f"published-{self.theta}"


@dataclass(frozen=True, kw_only=True)
class ByCount(Choice):
    """A given number of groups; with last_layer "own" the last layer's SAE comes on top.

    Args:
        num_groups: G, from 1 to the number of layers to group.
        rule: how the layers are split into G groups: a key of `RULES` in rules.py.
    """

    num_groups: int
    rule: str = "complete"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_num_groups(self.num_groups)
        check_choice("rule", self.rule, RULES)

    def _name(self) -> str:
        return f"count-{self.num_groups}{_unless_complete(self.rule)}"

    def _check(self, groupable: int) -> None:
        check_num_groups(self.num_groups, groupable)

    def _partition(self, distances: Distances, cosines: Cosines) -> Partition:
        return partition(distances, self.num_groups, self.rule, cosines)


@dataclass(frozen=True, kw_only=True)
class Even(ByCount):
    """Groups of equal size, give or take one: the baseline that needs no distances.

    Args:
        num_groups: G, from 1 to the number of layers to group.
    """

    rule: str = field(default="even", init=False)

    def _name(self) -> str:
        return f"even-{self.num_groups}"


@dataclass(frozen=True, kw_only=True)
class Budget(Choice):
    """The lowest predicted loss (`Partition.predicted_loss`) for a number of SAEs, or the reverse.

    The groups are those of the rule variance, whose predicted loss is the lowest at every G.

    Args:
        max_fvu_loss: the fewest groups that are predicted to lose at most this share of the FVU of
            one SAE per layer, from 0 up.
        saving: the most groups that save this share of the FLOPs that one SAE per layer takes,
            without the language model; from 0 to below 1. If given, max_fvu_loss is not used.
    """

    max_fvu_loss: float | None = 0.1
    saving: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        loss, saving = self.max_fvu_loss, self.saving
        unused = loss is None and saving is not None
        if not unused and not (isinstance(loss, int | float) and loss >= 0):
            raise UserError(f"groups.max_fvu_loss is {loss!r}: use a number from 0 up.")
        if saving is not None and not (isinstance(saving, int | float) and 0 <= saving < 1):
            raise UserError(f"groups.saving is {saving!r}: use a number from 0 to below 1.")

    def _name(self) -> str:
        bound = f"loss-{self.max_fvu_loss}" if self.saving is None else f"saving-{self.saving}"
        return f"budget-{bound}"

    def _most(self, groupable: int) -> int:
        """Return how many groups may be trained."""
        alone = int(self.last_layer == "own")
        return math.floor((1 - (self.saving or 0)) * (groupable + alone) + ROUNDING) - alone

    def _check(self, groupable: int) -> None:
        if self._most(groupable) < 1:
            alone = int(self.last_layer == "own")
            raise UserError(
                f"groups.saving={self.saving} leaves no SAE for the {groupable} layers to group: "
                f"one group for all of them saves {1 - (1 + alone) / (groupable + alone):.2f}."
            )

    def _partition(self, distances: Distances, cosines: Cosines) -> Partition:
        found = curve(distances, "variance", cosines)
        if self.saving is not None:
            return found[self._most(len(distances)) - 1]
        bound = (self.max_fvu_loss or 0) + ROUNDING
        # (one SAE per layer loses nothing, but for the rounding of measured cosines)
        return next((each for each in found if each.predicted_loss <= bound), found[-1])


@dataclass(frozen=True, kw_only=True)
class PerLayer(Choice):
    """One SAE per layer: the usual way, and the baseline of every comparison."""

    def _name(self) -> str:
        return "per_layer"

    def _partition(self, distances: Distances, cosines: Cosines) -> Partition:
        singles = [[layer] for layer in range(len(distances))]
        return build_partition(distances, singles, "per_layer", cosines)


@dataclass(frozen=True, kw_only=True)
class Explicit(Choice):
    """Groups written out by hand.

    Args:
        groups: lists of layers; each a run of neighbours, each layer in exactly one. The last
            layer belongs in them with last_layer "group" only.
    """

    groups: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        """Check the arguments, and sort the groups."""
        super().__post_init__()
        object.__setattr__(self, "groups", check_groups(self.groups))

    def _name(self) -> str:
        return f"explicit-{hashlib.sha256(json.dumps(self.groups).encode()).hexdigest()[:8]}"

    def _check(self, groupable: int) -> None:
        last = groupable  # the index of the last layer if it is kept out of the groups
        if self.last_layer != "group" and any(last in group for group in self.groups):
            raise UserError(
                f"The groups {self.groups} name the last layer, {last}, but last_layer is "
                f"{self.last_layer}, which keeps it out of them. Use groups.last_layer=group, or "
                f"remove layer {last} from the groups."
            )
        check_groups(self.groups, groupable)

    def _partition(self, distances: Distances, cosines: Cosines) -> Partition:
        return build_partition(distances, self.groups, "explicit", cosines)


@dataclass(frozen=True, kw_only=True)
class All(Choice):
    """All numbers of groups together, from one stream, as the paper trained them.

    For each rule the partitions for G = 1..n of the n layers to group; a group that several
    partitions share is trained once. G = n is the baseline of one SAE per layer. The first rule
    and theta decide which partition the run is summarised by.

    Args:
        rules: how the layers are split into G groups: a key of `RULES` in rules.py.
        theta: bound on AMAD, in fractions of pi, between 0 and 1.
        smaller: numbers of groups whose cost is matched by smaller SAEs on every layer, or
            "chosen" for the number that AMAD picks with the first rule.
    """

    rules: Sequence[str] = ("complete",)
    theta: float = 0.2
    smaller: Sequence[int] | str = "chosen"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_theta(self.theta)
        rules = self.rules
        if isinstance(rules, str) or not isinstance(rules, Sequence) or not rules:
            raise UserError(f"groups.rules is {rules!r}: give a list such as [complete,even].")
        for rule in rules:
            check_choice("rule", rule, RULES)
        if len(set(rules)) < len(rules):
            raise UserError(f"groups.rules names a rule twice, {rules!r}: name each once.")
        if self.smaller != "chosen":
            check_smaller(self.smaller)

    def _name(self) -> str:
        return "-".join(["all", *self.rules])

    def _check(self, groupable: int) -> None:
        if self.smaller != "chosen":
            check_smaller(self.smaller, groupable)

    def _plan(self, grouped: Distances, cosines: Cosines, num_layers: int) -> GroupPlan:
        chosen = self._partition(grouped, cosines)
        others = tuple(each for rule in self.rules for each in curve(grouped, rule, cosines))
        smaller = self.smaller
        if smaller == "chosen":
            smaller = [chosen.num_groups] if chosen.num_groups < len(grouped) else []
        sizes = tuple(sorted({int(count) for count in smaller}))
        return GroupPlan(chosen, self.last_layer, num_layers, self.theta, others, sizes)

    def _partition(self, distances: Distances, cosines: Cosines) -> Partition:
        return choose(distances, self.theta, self.rules[0], cosines)


def _unless_complete(rule: str) -> str:
    return "" if rule == "complete" else f"-{rule}"
