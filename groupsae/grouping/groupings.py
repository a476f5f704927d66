"""The groupings that a plan's SAEs can be put together to, for comparing them."""

from dataclasses import dataclass
from typing import Literal

from groupsae.grouping.partition import Partition
from groupsae.grouping.plan import GroupPlan, name_of, smaller_name_of


@dataclass(frozen=True)
class Grouping:
    """One way to serve every layer with the SAEs of a run.

    Attributes:
        name: such as `complete-3`, `per_layer` or `smaller-3`.
        kind: groups of layers; one SAE for each layer; or smaller ones on each layer, which
            together cost as much as num_groups groups.
        rules: that made this partition; several rules may agree on one.
        chosen_by: those of the rules for which theta picks it.
        num_groups: G, without the last layer's own SAE.
        partition: None for smaller SAEs.
        sae_of_layer: layer -> name of its SAE.
        grouped: the layers without a last one that has its own SAE, the same in all groupings.
    """

    name: str
    kind: Literal["groups", "per_layer", "smaller"]
    rules: list[str]
    chosen_by: list[str]
    num_groups: int
    partition: Partition | None
    sae_of_layer: dict[int, str]
    grouped: list[int]

    @property
    def names(self) -> list[str]:
        """Return its name, and those by which the other rules that made it would call it."""
        by_rule = [f"{rule}-{self.num_groups}" for rule in self.rules]
        return list(dict.fromkeys([self.name, *by_rule]))


def by_name(plan: GroupPlan) -> dict[str, Grouping]:
    """Return every name that the groupings of a plan go by -> grouping, the chosen one first."""
    return {name: each for each in groupings(plan) for name in each.names}


def groupings(plan: GroupPlan) -> list[Grouping]:
    """Return the groupings of a plan, the chosen one first, then by rule and number of groups.

    Partitions that several rules agree on come once, with all their rules.
    """
    own = {plan.num_layers - 1: name_of([plan.num_layers - 1])}
    own = own if plan.last_layer == "own" else {}
    grouped = [x for x in range(plan.partition.num_layers) if x not in plan.unserved]
    picked = _picked(plan)
    found: dict[str, Grouping] = {}
    for part in plan.partitions:
        key = str(part.groups)
        if key in found:
            known = found[key]
            known.rules.extend(r for r in [part.rule] if r not in known.rules)
        else:
            single = part.num_groups == part.num_layers
            found[key] = Grouping(
                "per_layer" if single else f"{part.rule}-{part.num_groups}",
                "per_layer" if single else "groups",
                [part.rule],
                [],
                part.num_groups,
                part,
                {x: name_of(g) for g in part.groups for x in g if x not in plan.unserved} | own,
                grouped,
            )
        if part.rule in picked and picked[part.rule] == part.num_groups:
            chosen = found[key].chosen_by
            chosen.extend(r for r in [part.rule] if r not in chosen)
    smaller = [
        Grouping(
            f"smaller-{count}",
            "smaller",
            [],
            [],
            count,
            None,
            {x: smaller_name_of(x, count) for x in grouped} | own,
            grouped,
        )
        for count in plan.smaller
    ]
    return list(found.values()) + smaller


def _picked(plan: GroupPlan) -> dict[str, int]:
    """Return rule -> the smallest number of groups with AMAD < theta."""
    if plan.theta is None:
        return {}
    picked: dict[str, int] = {}
    for part in sorted(plan.partitions, key=lambda p: p.num_groups):
        if part.amad < plan.theta:
            picked.setdefault(part.rule, part.num_groups)
    return picked
