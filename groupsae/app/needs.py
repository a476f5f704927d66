"""What a dry run says: its table, and what does not fit."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from groupsae.runtime.units import format_bytes, format_seconds
from groupsae.training.dry_run import Needs
from groupsae.training.profile import Trial


def print_needs(console: Console, found: list[Needs], processes: int, device: str) -> None:
    """Print what a run needs; with two columns where its groups are not known yet."""
    table = Table(title=f"dry run: what one of {processes} process(es) needs on {device}")
    table.add_column("")
    for each in found:
        table.add_column(f"{each.num_saes} SAEs", justify="right")
    for name, cells in _rows(found):
        table.add_row(name, *cells)
    console.print(table)
    if len(found) > 1:
        console.print(
            "The distances that decide how many SAEs there will be are not measured yet: these "
            "are the fewest and the most."
        )
    if processes > 1:
        console.print("The trial ran in one process: what they send each other comes on top.")
    for each in found:
        if each.trial is None:
            console.print(
                f"{each.num_saes} SAEs do not fit into the {format_bytes(each.free)} free on "
                f"{device}: lower sae.expansion or stream.blocks_per_step, train fewer SAEs, or "
                "spread them over processes (trainer=sae_parallel)."
            )


def too_small(places: Mapping[Path, int]) -> list[str]:
    """Return a sentence for each disk that has too little room.

    Args:
        places: folder, there or not -> bytes that will be written into it at most.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, needed in places.items():
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        disk = there.stat().st_dev
        first, before = disks.get(disk, (there, 0))
        disks[disk] = first, before + needed
    return [
        f"The disk of {folder} has room for {format_bytes(free)}, and up to "
        f"{format_bytes(needed)} are needed there, files of an earlier run included: name "
        "other folders (output, data.cache) or lower tokens."
        for folder, needed in disks.values()
        if needed > (free := shutil.disk_usage(folder).free)
    ]


def _rows(found: list[Needs]) -> list[tuple[str, list[str]]]:
    def row(name: str, show: Callable[[Needs], str]) -> tuple[str, list[str]]:
        return name, [show(each) for each in found]

    def tried(show: Callable[[Needs, Trial], str]) -> Callable[[Needs], str]:
        return lambda each: "does not fit" if each.trial is None else show(each, each.trial)

    def seconds(part: str) -> Callable[[Needs], str]:
        return tried(lambda each, _: format_seconds(each.seconds[part]))

    rate = tried(lambda n, t: f"{n.tokens / n.steps / t.step_seconds:,.0f}")
    return [
        row("parameters", lambda n: f"{n.parameters:,}"),
        row("weights", lambda n: format_bytes(n.weights)),
        row("gradients", lambda n: format_bytes(n.gradients)),
        row("optimiser state", lambda n: format_bytes(n.optimizer)),
        row("activations of a step", lambda n: format_bytes(n.activations)),
        row("peak memory, by a trial", tried(lambda _, t: format_bytes(t.peak))),
        row(
            "the same with half of the latents dead", tried(lambda _, t: format_bytes(t.peak_dead))
        ),
        row("tokens per SAE", lambda n: f"{n.tokens:,}"),
        row("steps", lambda n: f"{n.steps:,}"),
        row("tokens per second, by a trial", rate),
        row("training", seconds("training")),
        row("validation", seconds("validation")),
        row("measuring the layers", seconds("measuring the layers")),
        row("disk: run folder", lambda n: format_bytes(n.run_folder)),
        row("disk: packed text, at most", lambda n: format_bytes(n.text)),
        row("disk: stored activations, at most", lambda n: format_bytes(n.stored)),
    ]
