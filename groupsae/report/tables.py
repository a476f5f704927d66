"""What a run prints: the groups before training, the result after it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from groupsae.grouping.plan import GroupPlan

if TYPE_CHECKING:
    from groupsae.training.cost import RunCost


def print_plan(console: Console, plan: GroupPlan, cost: "RunCost") -> None:
    """Print the chosen groups and the saving they promise."""
    part = plan.partition
    groups = "1 group" if part.num_groups == 1 else f"{part.num_groups} groups"
    console.print(
        f"{groups}, rule {part.rule}, AMAD {part.amad:.4f}, largest diameter "
        f"{part.max_diameter:.4f} (fractions of pi)"
    )
    table = Table()
    table.add_column("group")
    table.add_column("layers")
    table.add_column("diameter", justify="right")
    for group, diameter, name in zip(part.groups, part.diameters, plan.names, strict=False):
        table.add_row(name, _span(group), f"{diameter:.4f}")
    if plan.last_layer == "own":
        table.add_row(plan.names[-1], f"{plan.num_layers - 1} (last layer, its own SAE)", "-")
    console.print(table)
    console.print(
        f"{len(plan.saes)} SAEs instead of {sum(map(len, plan.saes))}: saves {cost.saving:.1%} of "
        f"the {_flops(cost.total_per_layer)} of one SAE per layer, with distances, sparse "
        "decoding and the last layer counted "
        f"(the paper's count, dense and without them: {cost.paper_saving:.1%})."
    )
    if cost.saving < 0 and len(plan.saes) < sum(map(len, plan.saes)):
        console.print(
            "At this budget measuring the distances costs more than sharing saves; it is paid "
            "once, whatever the budget."
        )


def print_result(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the table at the end of a run from its `summary.json`."""
    table = Table(title="held-out reconstruction")
    for column, justify in (
        ("group", "left"),
        ("layers", "left"),
        ("tokens per layer", "right"),
        ("FVU", "right"),
        ("L0", "right"),
        ("dead %", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, group in summary["groups"].items():
        per_layer = sum(group["tokens_per_layer"].values()) / len(group["layers"])
        table.add_row(
            name,
            _span(group["layers"]),
            f"{per_layer:,.0f}",
            f"{group['fvu']:.4f}",
            f"{group['l0']:.1f}",
            f"{100 * group['dead']:.1f}",
        )
    table.add_section()
    table.add_row("mean over layers", "", "", f"{summary['fvu']:.4f}", "", "")
    console.print(table)
    cost, speed = summary["cost"], summary["tokens_per_second"]
    console.print(
        f"{summary['tokens']:,} tokens per SAE at {speed:,.0f} tokens/s; saved "
        f"{cost['saving']:.1%} of the FLOPs of one SAE per layer."
    )
    console.print(f"Run folder: {summary['folder']}", soft_wrap=True)


def _flops(count: float) -> str:
    """Return a count of FLOPs with a readable prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= size:
            return f"{count / size:.3g} {prefix}FLOP"
    return f"{count / 1e9:.3g} GFLOP"


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
