"""What a run prints: the groups before training, the result after it."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table as Screen

from groupsae.grouping.partition import LOSS_ERROR
from groupsae.grouping.plan import GroupPlan
from groupsae.reporting import tables
from groupsae.reporting.downstream import DOWNSTREAM_TABLES
from groupsae.reporting.formatting import flops, number, percent
from groupsae.reporting.load import RunFiles, value_of

if TYPE_CHECKING:
    from groupsae.cost.model import RunCost

WIDE = 7  # columns of a table on a screen; the report and the csv have all


def show(
    console: Console,
    table: tables.Table | None,
    title: str | None = None,
    columns: str = "",
    halves: str = "",
) -> None:
    """Print a table, if there is one; its marked rows are bold.

    `title` replaces the caption. `columns` are names with spaces between, printed where they exist
    (empty: all); those in `halves` show half of their interval.
    """
    if table is None:
        return
    screen = Screen(title=title or table.caption, box=box.SIMPLE_HEAD, pad_edge=False)
    names = [name for name in columns.split() or table.columns if name in table.columns]
    for name in names:
        heading = table.heading(name)
        side: Literal["left", "right"] = "left" if heading.is_text else "right"
        screen.add_column(heading.value, justify=side, no_wrap=True)
    for row in range(len(table.frame)):
        cells = (table.cell(row, name, half=name in halves.split()).value for name in names)
        screen.add_row(*cells, style="bold" if row in table.marked else None)
    console.print(screen)


def print_plan(console: Console, plan: GroupPlan, cost: "RunCost") -> None:
    """Print the chosen groups and the saving they promise."""
    part = plan.partition
    if plan.others:
        console.print(
            f"{len(plan.members)} SAEs are trained for all groupings; the one that AMAD chooses:"
        )
    console.print(
        f"{part.num_groups} group{'s' * (part.num_groups > 1)}, rule {part.rule}, AMAD "
        f"{part.amad:.4f}, largest diameter {part.max_diameter:.4f} (fractions of pi)"
    )
    if part.num_groups < part.num_layers and not math.isnan(part.variance):
        console.print(
            f"Angular variance {part.variance:.4f}: plain SAEs are predicted to have "
            f"{part.predicted_loss:.1%} more FVU than one SAE per layer (on models that it was "
            f"not fitted on, this missed the loss by {LOSS_ERROR[0]:.0%} to {LOSS_ERROR[1]:.0%})."
        )
    show(console, tables.groups_table(RunFiles(plan=plan.to_json())))
    if plan.last_layer == "own":
        console.print("The last layer has its own SAE.")
    num_layers = sum(map(len, plan.saes))
    console.print(
        f"{len(plan.saes)} SAEs instead of {num_layers}: saves {cost.saving:.1%} of the "
        f"{flops(cost.total_per_layer)} of one SAE per layer, with "
        f"{'distances, ' if cost.distances else ''}sparse decoding and the last layer counted "
        f"(the paper's count, dense and without them: {cost.paper_saving:.1%})."
    )
    if cost.saving < 0 and len(plan.saes) < num_layers:
        console.print(
            "At this budget measuring the distances costs more than sharing saves; it is paid "
            "once, whatever the budget."
        )


def print_result(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the table at the end of a run from its `summary.json`."""
    show(console, tables.groups_table(RunFiles(summary=summary)))
    rows = summary["layers_per_token"]
    console.print(
        f"{summary['tokens']:,} tokens per SAE"
        + f" (rows of up to {rows} layers from each)" * (rows > 1)
        + f" at {summary['tokens_per_second']:,.0f} tokens/s; "
        f"saved {summary['cost']['saving']:.1%} of the FLOPs of one SAE per layer."
    )
    skipped = {n: g["skipped"] for n, g in summary["groups"].items() if g["skipped"]}
    if skipped:
        counts = ", ".join(f"{count} by {name}" for name, count in skipped.items())
        console.print(
            f"Steps left out, for a loss or gradient that was not finite: {counts}.",
            soft_wrap=True,
        )
    others = len(summary["groups"]) - len(summary["chosen"])
    if others:
        console.print(f"{others} more SAEs were trained; their figures are in summary.json.")
    console.print(f"Run folder: {summary['folder']}", soft_wrap=True)


def print_ledger(console: Console, ledger: Mapping[str, Any]) -> None:
    """Print the cost of a run, planned and measured, from its `ledger.json`."""
    for build in tables.COST_TABLES:
        show(console, build(RunFiles(ledger=ledger)))


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Print `evaluation.json`: the layers of the chosen grouping, and several groupings."""
    run, chosen = RunFiles(evaluation=evaluation), evaluation["groupings"][0]
    show(
        console,
        tables.layers_table(run),
        f"{evaluation['tokens']:,} held-out tokens, {chosen['name']} "
        f"(± half of the {100 * evaluation['bootstrap']['level']:g} % interval)",
        "layer sae fvu delta_ce delta_ce_percent ce_score "
        "embedding_loss embedding_score retrieval_loss",
        halves="fvu delta_ce embedding_loss",
    )
    shares = [row.get("largest_share") or 0.0 for row in evaluation["layers"]]
    if fmean(shares) > 0.5:
        rest = fmean(
            sae["fvu_rest"] for sae in evaluation["saes"] if sae["name"] in chosen["saes"]
        )
        console.print(
            f"The 1 % of dimensions with the largest variance have {percent(min(shares))} to "
            f"{percent(max(shares))} of it. FVU without them: {number(rest)} (mean over SAEs).",
            soft_wrap=True,
        )
    clean, groupings = value_of(evaluation.get("ce")), tables.groupings_table(run)
    if clean is None:
        found, chance = (
            number(value_of(evaluation.get(key))) for key in ("retrieval", "retrieval_chance")
        )
        console.print(
            "1 − cos: of embeddings, means over a block. The model's own find a block of the same "
            f"document with a mean reciprocal rank of {found} (in a random order {chance}); "
            "'retrieval lost' is the drop.",
            soft_wrap=True,
        )
    else:
        zero, mean = (
            number(fmean(row[key]["value"] for row in evaluation["layers"]), 3)
            for key in ("ce_zero", "ce_mean")
        )
        console.print(
            f"The language model's CE is {number(clean)} nats; with one layer set to zero {zero}, "
            f"to its mean {mean} (mean over layers)."
        )
    if chosen["spliced_together"] and groupings:
        columns = [name for name in groupings.columns if name.endswith("_together")]
        found = ", ".join(
            f"{tables.HEADINGS[name].split(', all')[0]} {groupings.cell(0, name, half=True).value}"
            for name in columns
        )
        console.print(f"All layers replaced at once: {found}.", soft_wrap=True)
    if len(run.groupings) > 1:
        show(
            console,
            groupings,
            "every grouping: mean over the grouped layers; lost: against one SAE per layer; "
            "by V: as predicted",
            "grouping fvu fvu_lost fvu_lost_predicted delta_ce_percent "
            "delta_ce_percent_lost embedding_loss embedding_loss_lost flops",
            halves="fvu_lost delta_ce_percent_lost embedding_loss_lost",
        )
        show(
            console,
            tables.baselines_table(run),
            columns="baseline metric difference distinguishable",
            halves="difference",
        )


def print_part(console: Console, part: str, found: Mapping[str, Any]) -> None:
    """Print the tables of a part of the evaluation, the columns that a narrow screen can hold."""
    run = RunFiles(downstream={part: found})
    for build in DOWNSTREAM_TABLES[part]:
        if (table := build(run)) is not None:
            columns = " ".join(table.columns[:WIDE])
            show(console, table, columns=columns, halves=columns)


def print_explanations(console: Console, explained: Mapping[str, Any]) -> None:
    """Print for every SAE how well rules explain its latents, and how many fell out."""
    screen = Screen(
        title="Latents explained by rules, on held-out text", box=box.SIMPLE_HEAD, pad_edge=False
    )
    screen.add_column("SAE", no_wrap=True)
    columns = {
        "f1": "F1",
        "null_f1": "null",
        "adjusted_f1": "adj.",
        "precision": "prec.",
        "recall": "recall",
        "unigram_auprc": "token",
    }
    for heading in ("latents", "rare", *columns.values()):
        screen.add_column(heading, justify="right", no_wrap=True)
    for name, sae in explained.items():
        mean = sae["mean"]
        values = [number(mean[key], 2) if mean else "" for key in columns]
        screen.add_row(name, str(len(sae["latents"])), str(sae["rare"]), *values)
    console.print(screen)


def print_judged(console: Console, judged: Mapping[str, Any]) -> None:
    """Print how well a judge's explanations tell where latents fire, next to those of rules."""
    qualified, judge = judged["qualification"]["qualified"], judged["judge"]
    title = f"Latents explained by {judge['name']}{'' if qualified else ' (not qualified)'}"
    screen = Screen(
        title=f"{title}, and by rules on the same windows", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("SAE", "by", "task"):
        screen.add_column(heading, no_wrap=True)
    for heading in ("F1", "null", "adj.", "acc.", "failed"):
        screen.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for name, sae in judged["saes"].items():
        first = f"{name} ({len(sae['latents'])})"
        for by, who in (("judge", judge["kind"]), ("rules", "rules")):
            for task, found in sae["mean"][by].items():
                f1, accuracy = found["f1"], found["balanced_accuracy"]["mean"]
                cells = [_with_half(f1), *map(_two, (f1["null"], f1.get("adjusted"), accuracy))]
                cells = cells if qualified or by == "rules" else ["-"] * len(cells)
                failed = f"{found['failed']:,}" if by == "judge" else ""
                screen.add_row(first, who, task, *cells, failed)
                first = ""
        asked = sae["mean"]["judge"]
        weighted = [f"{task} {_two(found['f1']['by_firings'])}" for task, found in asked.items()]
        notes.append(
            f"{name}: "
            + f"F1 weighted by firings: {', '.join(weighted)}; intruders found by the judge "
            f"{_two(sae['intruder'])} (chance 0.2); discrimination "
            f"{_two(sae['discrimination'])} (chance 0.5); "
            * qualified
            + f"left out: {sae['few_windows']} latents with few windows, {sae['not_explained']} "
            "without an explanation"
            + f"; {sae['overlap']:.0%} of the windows to score on were explained"
            * bool(sae["overlap"])
        )
    console.print(screen)
    console.print(
        "F1 at the natural rate, with half of its 95 % interval, and balanced accuracy (acc.): "
        "means over latents; null: by the explanation of another latent.",
        soft_wrap=True,
    )
    for note in notes:
        console.print(note, soft_wrap=True)


def _with_half(entry: Mapping[str, Any]) -> str:
    low, high = (entry.get("interval", {}).get(end) for end in ("low", "high"))
    return _two(entry["mean"]) + ("" if low is None else f" ±{(high - low) / 2:.2f}")


def _two(value: float | None) -> str:
    return number(value, 2)


def print_groupings(console: Console, run: RunFiles) -> None:
    """Print how well the latents of several groupings are explained, and how layers share them."""
    halves = "f1 one_label_f1 f1_difference labels"
    ends = "(± half of the 95 % interval)"
    explained = "grouping f1 one_label_f1 lexicality f1_difference"
    show(console, tables.explained_table(run), f"by grouping {ends}", explained, halves)
    meaning = "grouping labels tau_1 tau_4 same narrows different"
    show(console, tables.meaning_table(run), f"shared latents {ends}", meaning, halves)
