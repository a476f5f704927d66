"""The tables of the page about a run itself: its SAEs, its training, its cost."""

from typing import Any

from groupsae.reporting.formatting import PARTS, duration, flops, number, percent, span
from groupsae.reporting.load import RunFiles
from groupsae.reporting.page_tables import Cell, Table


def groups_table(run: RunFiles) -> Table | None:
    """Return the SAEs of the run with their layers and largest angles."""
    table = Table(
        "The SAEs of this run", ["SAE", "layers", "largest angle, fractions of π"], text=2
    )
    for name, layers in run.saes.items():
        diameter = None
        if run.distances is not None and len(layers) > 1:
            diameter = float(run.distances[layers][:, layers].max())
        table.rows.append([Cell(name), Cell(span(layers)), Cell(number(diameter, 4))])
    return table if table.rows else None


def trained_table(run: RunFiles) -> Table | None:
    """Return the held-out figures at the end of training, for a run that was not evaluated."""
    groups = (run.summary or {}).get("groups") or {}
    if run.evaluation is not None or not groups:
        return None
    table = Table("Held-out reconstruction at the end of training", ["SAE", "FVU", "L0", "dead"])
    for name, group in groups.items():
        table.rows.append(
            [
                Cell(name),
                Cell(number(group["fvu"], 4)),
                Cell(number(group["l0"], 1)),
                Cell(percent(group["dead"])),
            ]
        )
    return table


def ledger_tables(run: RunFiles) -> list[Table]:
    """Return what was planned and measured, part by part, and what was saved."""
    if run.ledger is None:
        return []
    parts = Table("Where the work went", ["part", "FLOPs planned", "FLOPs measured", "time"])
    rows = [*run.ledger.get("parts", [])]
    evaluated = (run.evaluation or {}).get("cost")
    rows += [{"part": "evaluation", **evaluated}] if evaluated else []
    for row in rows:
        parts.rows.append(_ledger_row(PARTS.get(row["part"], row["part"]), row))
    per_layer = run.ledger.get("per_layer")
    if per_layer:
        parts.rows.append(_ledger_row("for comparison: one SAE per layer", per_layer))
        parts.marked.append(len(parts.rows) - 1)
    saving = run.ledger.get("saving") or {}
    names = {
        "flops": "FLOPs, everything counted",
        "seconds": "seconds",
        "paper": "as the paper counts",
        "paper_both_sides": "as the paper counts, the last layer on both sides",
    }
    saved = Table("Saved against one SAE per layer at equal tokens", ["count", "saved"])
    saved.rows = [
        [Cell(text), Cell(percent(saving[key]))]
        for key, text in names.items()
        if saving.get(key) is not None
    ]
    sharing, found = run.ledger.get("sharing"), [parts]
    found += [saved] if saved.rows else []
    if sharing:
        table = Table("All groupings from one stream", ["", "value"])
        table.rows = [
            [Cell("groupings"), Cell(str(sharing["groupings"]))],
            [Cell("time together"), Cell(duration(sharing["seconds"]))],
            [Cell("time one after the other"), Cell(duration(sharing["seconds_separately"]))],
            [Cell("factor"), Cell(number(sharing["factor"], 2))],
            [
                Cell("bound: the language model twice, each SAE once"),
                Cell(duration(sharing["bound_seconds"])),
            ],
        ]
        found.append(table)
    return found


def _ledger_row(name: str, row: dict[str, Any]) -> list[Cell]:
    return [
        Cell(name),
        Cell(flops(row.get("planned_flops"))),
        Cell(flops(row.get("measured_flops"))),
        Cell(duration(row.get("seconds"))),
    ]
