"""The groupings that a plan's SAEs can be combined to, for comparing them."""

from dataclasses import dataclass, field
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
        num_groups: G, without the last layer's own SAE.
        partition: None for smaller SAEs.
        sae_of_layer: layer -> name of its SAE.
        grouped: the layers without a last one that has its own SAE, the same in all groupings.
        rules: the rules that gave this partition; several rules may agree on one.
        chosen_by: those of the rules for which theta picks it.
    """

    name: str
    kind: Literal["groups", "per_layer", "smaller"]
    num_groups: int
    partition: Partition | None
    sae_of_layer: dict[int, str]
    grouped: list[int]
    rules: list[str] = field(default_factory=list)
    chosen_by: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Return its name, and the names that the other rules that made it give it."""
        by_rule = [f"{rule}-{self.num_groups}" for rule in self.rules]
        return list(dict.fromkeys([self.name, *by_rule]))


def by_name(plan: GroupPlan) -> dict[str, Grouping]:
    """Return all names of a plan's groupings -> grouping, the chosen one first."""
    return {name: each for each in groupings(plan) for name in each.names}


def groupings(plan: GroupPlan) -> list[Grouping]:
    """Return the groupings of a plan, the chosen one first, then by rule and number of groups.

    Partitions that several rules agree on come once, with all their rules.
    """
    last = plan.num_layers - 1
    own = {last: name_of([last])} if plan.last_layer == "own" else {}
    grouped = [x for x in range(plan.partition.num_layers) if x not in plan.unserved]
    scored = [p for p in plan.partitions if plan.theta is not None and p.amad < plan.theta]
    scored.sort(key=lambda p: -p.num_groups)
    picked = {part.rule: part.num_groups for part in scored}  # the fewest below theta
    found: dict[str, Grouping] = {}
    for part in plan.partitions:
        single, count = part.num_groups == part.num_layers, part.num_groups
        served = {x: name_of(g) for g in part.groups for x in g if x in grouped}
        new = Grouping(
            "per_layer" if single else f"{part.rule}-{count}",
            "per_layer" if single else "groups",
            count,
            part,
            served | own,
            grouped,
        )
        grouping = found.setdefault(str(part.groups), new)
        if part.rule not in grouping.rules:
            grouping.rules.append(part.rule)
        if picked.get(part.rule) == count and part.rule not in grouping.chosen_by:
            grouping.chosen_by.append(part.rule)
    for count in plan.smaller:
        served = {x: smaller_name_of(x, count) for x in grouped}
        name = f"smaller-{count}"
        found[name] = Grouping(name, "smaller", count, None, served | own, grouped)
    return list(found.values())
