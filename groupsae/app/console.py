"""What a run prints: the groups before training, the result after it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from groupsae.grouping.plan import GroupPlan
from groupsae.reporting.formatting import PARTS, duration, flops, number, percent
from groupsae.reporting.load import chosen_grouping, interval

if TYPE_CHECKING:
    from groupsae.cost.model import RunCost


def print_plan(console: Console, plan: GroupPlan, cost: "RunCost") -> None:
    """Print the chosen groups and the saving they promise."""
    part = plan.partition
    if plan.others:
        console.print(
            f"{len(plan.members)} SAEs are trained for all groupings; the one that AMAD chooses:"
        )
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
        f"the {flops(cost.total_per_layer)} of one SAE per layer, with "
        f"{'distances, ' if cost.distances else ''}sparse decoding and the last layer counted "
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
        if name not in summary["chosen"]:
            continue
        counts = group["tokens_per_layer"].values()
        table.add_row(
            name,
            _span(group["layers"]),
            " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})),
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
    skipped = {n: g["skipped"] for n, g in summary["groups"].items() if g.get("skipped")}
    if skipped:
        each = ", ".join(f"{count} by {name}" for name, count in skipped.items())
        console.print(
            f"Steps left out, for a loss or gradient that was not finite: {each}.", soft_wrap=True
        )
    beside = len(summary["groups"]) - len(summary["chosen"])
    if beside:
        console.print(f"{beside} more SAEs were trained beside these; figures in summary.json.")
    console.print(f"Run folder: {summary['folder']}", soft_wrap=True)


def print_ledger(console: Console, ledger: Mapping[str, Any]) -> None:
    """Print what a run cost, planned and measured, from its `ledger.json`."""
    table = _numbers("cost", ["part"], ["FLOPs planned", "FLOPs measured", "time"])
    for part in ledger["parts"]:
        table.add_row(
            PARTS.get(part["part"], part["part"]),
            flops(part["planned_flops"]),
            flops(part["measured_flops"]),
            duration(part["seconds"]),
        )
    console.print(table)
    saving = ledger["saving"]
    console.print(
        f"Against one SAE per layer at equal tokens the chosen groups save {saving['flops']:.1%} "
        f"of the FLOPs and {saving['seconds']:.1%} of the time."
    )
    sharing = ledger["sharing"]
    if sharing:
        console.print(
            f"All {sharing['groupings']} groupings from one stream took "
            f"{duration(sharing['seconds'])}, one run for each would take "
            f"{duration(sharing['seconds_separately'])}: {sharing['factor']:.1f} times as long. "
            f"(Bound: the language model's forward twice and each SAE once, "
            f"{duration(sharing['bound_seconds'])}.)"
        )


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Print the layers of the chosen grouping and, where there are several, all groupings.

    Args:
        console: where to print.
        evaluation: what `evaluation.json` holds.
    """
    chosen = chosen_grouping(evaluation["groupings"])
    if chosen is None:
        return
    results = {(r["sae"], int(r["layer"])): r for r in evaluation["results"]}
    level = 100 * evaluation["bootstrap"]["level"]
    table = _numbers(
        f"{evaluation['tokens']:,} held-out tokens, {chosen['name']} "
        f"(± half of the {level:g} % interval)",
        ["layer", "SAE"],
        ["FVU", "ΔCE, nats", "ΔCE, %", "CE score"],
    )
    for layer, sae in sorted((int(x), name) for x, name in chosen["sae_of_layer"].items()):
        row = results.get((sae, layer))
        if row is not None:
            table.add_row(str(layer), sae, *_quality(row))
    table.add_section()
    for sae in evaluation["saes"]:
        if sae["name"] in chosen["saes"] and len(sae["layers"]) > 1:
            table.add_row("mean", sae["name"], *_quality(sae))
    for name in ("grouped", "all"):
        table.add_row("mean", f"{name} layers", *_quality(chosen[f"{name}_layers"]))
    console.print(table)
    console.print(_scale(evaluation, chosen))
    if len(evaluation["groupings"]) > 1:
        console.print(_groupings(evaluation["groupings"], chosen))


def _scale(evaluation: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Return the CE that the losses are to be seen against, and that of all layers at once."""
    if interval(evaluation["ce"]) is None:
        return "The language model predicts no next token, so it has no CE to compare."
    ends = [
        [v.value for row in evaluation["layers"] if (v := interval(row.get(key)))]
        for key in ("ce_zero", "ce_mean")
    ]
    zero, mean = (number(sum(v) / len(v) if v else None, 3) for v in ends)
    text = (
        f"The language model's CE is {_alone(evaluation['ce'], 4)} nats; with one layer set to "
        f"zero {zero}, to its mean {mean} (mean over layers)."
    )
    together = chosen.get("spliced_together")
    if together:
        text += (
            f"\nAll layers replaced at once: CE {_alone(together['ce'], 4)}, ΔCE "
            f"{_with_half(together['delta_ce'], 4)} nats "
            f"({_alone(together['delta_ce_percent'], 2)} %), KL {_with_half(together['kl'], 4)}."
        )
    return text


def _quality(row: Mapping[str, Any]) -> list[str]:
    return [
        _with_half(row.get("fvu"), 4),
        _with_half(row.get("delta_ce"), 4),
        _alone(row.get("delta_ce_percent"), 2),
        _alone(row.get("ce_score"), 3),
    ]


def _groupings(groupings: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Table:
    table = _numbers(
        "every grouping: mean over the grouped layers; lost: against one SAE per layer",
        ["grouping"],
        ["AMAD", "FVU", "FVU lost", "ΔCE, %", "ΔCE lost, %", "FLOPs"],
    )
    for grouping in groupings:
        means, lost = grouping["grouped_layers"], grouping.get("against_per_layer") or {}
        table.add_row(
            grouping["name"],
            number(grouping.get("amad"), 3),
            _alone(means.get("fvu"), 4),
            _with_half(lost.get("fvu"), 4),
            _alone(means.get("delta_ce_percent"), 2),
            _with_half(lost.get("delta_ce_percent"), 2),
            percent((grouping.get("cost") or {}).get("flops"), 0),
            style="bold" if grouping is chosen else None,
        )
    return table


def _numbers(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)  # fits 80 columns
    for column in text:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _alone(stored: Any, digits: int) -> str:
    found = interval(stored)
    return number(found.value if found else None, digits)


def _with_half(stored: Any, digits: int) -> str:
    found = interval(stored)
    if found is None or found.low is None or found.high is None:
        return _alone(stored, digits)
    return f"{number(found.value, digits)} ±{number((found.high - found.low) / 2, digits)}"


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
