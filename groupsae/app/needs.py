"""Prints what a dry run found: a table, and what does not fit."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from groupsae.runtime.units import format_bytes, format_seconds
from groupsae.training.estimate import FLOAT, Needs

TIMED = ("training", "validation", "measuring the layers")


def _cells(needs: Needs) -> dict[str, str]:
    """Return the table's values for one way to group the layers."""
    trial, weights = needs.trial, format_bytes(FLOAT * needs.parameters)
    measured = {}
    if trial is not None:
        rate = needs.tokens / needs.steps / trial.step_seconds
        measured = {
            "peak memory, by a trial": format_bytes(trial.peak),
            "the same with half of the latents dead": format_bytes(trial.peak_dead),
            "tokens per second, by a trial": f"{rate:,.0f}",
            **{part: format_seconds(needs.seconds[part]) for part in TIMED},
        }
    return {
        "parameters": f"{needs.parameters:,}",
        "weights": weights,
        "gradients": weights,
        "optimiser state": format_bytes(2 * FLOAT * needs.parameters),  # Adam's two moments
        "activations of a step": format_bytes(needs.activations),
        "peak memory, by a trial": "does not fit",
        "the same with half of the latents dead": "does not fit",
        "tokens per SAE": f"{needs.tokens:,}",
        "steps": f"{needs.steps:,}",
        "tokens per second, by a trial": "does not fit",
        **dict.fromkeys(TIMED, "does not fit"),
        "disk: run folder": format_bytes(needs.run_folder),
        "disk: packed text, at most": format_bytes(needs.text),
        "disk: stored activations, at most": format_bytes(needs.stored),
        **measured,
    }


def print_needs(console: Console, found: Sequence[Needs], processes: int, device: str) -> None:
    """Print the needs of a run; with two columns if its groups are not known yet."""
    table = Table(title=f"dry run: needs of one process, of {processes}, on {device}")
    table.add_column("")
    for needs in found:
        table.add_column(f"{needs.num_saes} SAEs", justify="right")
    columns = [_cells(needs) for needs in found]
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))
    console.print(table)
    if len(found) > 1:
        console.print(
            "The distances that decide how many SAEs there will be are not measured yet: these "
            "are the fewest and the most."
        )
    if processes > 1:
        console.print(
            "The trial ran in one process: communication between processes is not included."
        )
    for needs in found:
        if needs.trial is None:
            console.print(
                f"{needs.num_saes} SAEs do not fit into the {format_bytes(needs.free)} free on "
                f"{device}: lower sae.expansion or stream.blocks_per_step, train fewer SAEs, or "
                "spread them over processes (trainer=sae_parallel)."
            )


def too_small(places: Mapping[Path, int]) -> list[str]:
    """Return a sentence for each disk that has too little room for the bytes of its folders."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, needed in places.items():
        existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        disk = existing.stat().st_dev
        first, before = disks.get(disk, (existing, 0))
        disks[disk] = first, before + needed
    return [
        f"The disk of {folder} has room for {format_bytes(free)}, and up to "
        f"{format_bytes(needed)} are needed there, files of an earlier run included: name "
        "other folders (output, data.cache) or lower tokens."
        for folder, needed in disks.values()
        if needed > (free := shutil.disk_usage(folder).free)
    ]
