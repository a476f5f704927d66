"""Activations from disk against activations from the model: `python -m benchmarks.store`.

Of the bundled model and of a random GPT-NeoX of Pythia-70M's shape, in blocks that take turns
within one process: training rows made by the language model, and read from a store with and
without checksums; what filling the store takes compared with its forwards alone. Then complete
runs by `groupsae.train`, streaming and from the store, by turns.

What was written is read from the operating system's cache, so these are the costs of the code and
of memory, not of a disk. How many bytes a token is, which a disk must then bring, is in the table.

Four minutes on two cores. Writes benchmarks/results/store.md. `size=smallest` takes two steps of
the bundled model, for CI.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks.loop import BUNDLED, ON_RANDOM, SHAPES, VOCAB, Shape
from benchmarks.timing import (
    SMALLEST_RUN,
    Seconds,
    interleaved,
    now,
    options,
    random_model,
    smallest,
    write,
)
from groupsae.app.fit import build
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from groupsae.data.activations import ActivationDataModule
from groupsae.data.rows import by_model
from groupsae.runtime.quiet import quiet

MODELS = (BUNDLED,) if smallest() else (BUNDLED, "pythia-70m")
ROUNDS, RUNS = (2, 1) if smallest() else (5, 2)  # the first round is not counted
STEPS = 2 if smallest() else 12  # that the blocks read
RUN_STEPS = 2 * STEPS  # of a complete run
MODEL, CHECKED, READ = "language model", "store, first time", "store, again"


class Measured(NamedTuple):
    """Of one model.

    Attributes:
        rows: seconds of all steps' rows, by where they come from.
        fill: seconds of filling the store with one step's blocks, for each step.
        forward: seconds of the same forwards, with nothing written.
        runs: seconds of a step of a complete run, streaming and from the store.
        tokens: of a step.
        bytes_per_token: that are read.
    """

    rows: dict[str, Seconds]
    fill: float
    forward: float
    runs: tuple[float, float]
    tokens: int
    bytes_per_token: int


def module(given: Sequence[str], folder: Path) -> ActivationDataModule:
    """Return the data module of a run, with one group for each layer, ready to be read."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        run = build(compose("train", list(given)), folder, Console(quiet=True))
    data = run.data
    data.setup("fit")
    data.set_slots([[layer] for layer in range(data.lm.geometry.num_layers)])
    return data


def streamed(data: ActivationDataModule) -> float:
    """Return the seconds in which the language model makes all rows."""
    start = now(data.device)
    for tokens in data.loader("train", STEPS):
        data.live.rows(data.drawn(tokens, data.exchanges[0]).to(data.device))
    return now(data.device) - start


def stored(data: ActivationDataModule, *, checked: bool) -> float:
    """Return the seconds in which all rows come from the store, checked or trusted."""
    for shard in data.reader.store._shards:  # verified once in a process
        shard.verified[:] = not checked
    start = now(data.device)
    for rows in data.train_dataloader():
        data.reader.rows(rows.to(data.device))
    return now(data.device) - start


@torch.no_grad()
def forwards(data: ActivationDataModule) -> float:
    """Return the seconds of the forwards that the store was filled with, for each step."""
    start = now(data.device)
    layers = range(data.lm.geometry.num_layers)
    for tokens in data.loader("train", STEPS):
        show = by_model(data.hooked, tokens.to(data.device))
        for first in range(0, len(tokens), data.blocks_per_forward):
            show(slice(first, first + data.blocks_per_forward), layers, _nothing)
    return (now(data.device) - start) / STEPS


def _nothing(layer: int, acts: torch.Tensor) -> None:
    """Look at activations, and let them go."""


def run_seconds(given: Sequence[str], folder: Path) -> float:
    """Return the seconds of a step of a complete run."""
    command = [sys.executable, "-m", "groupsae.train", *given, "overwrite=true"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    newest = max(folder.rglob("summary.json"), key=lambda file: file.stat().st_mtime)
    summary = json.loads(newest.read_text())
    return float(summary["seconds_training"] / summary["steps"])


def measured(given: Sequence[str], folder: Path) -> Measured:
    """Measure one model; `folder` takes runs and store."""
    keep = f"data.cache={folder / 'store'}"
    given = [
        *given, "groups=per_layer", f"output={folder / 'outputs'}", "eval_every=1_000_000",
        "checkpoint_every=1_000_000", "calibration.tokens=20_000", "logger=none",
        "stream.heldout_tokens=4096", "stream.num_workers=0", "stream.blocks_per_step=8",
        "+trainer.enable_progress_bar=false", *(SMALLEST_RUN if smallest() else []),
    ]  # fmt: skip
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("train", given)
    size = cfg.stream.blocks_per_step * cfg.stream.context
    few, complete = f"tokens={STEPS * size}", f"tokens={RUN_STEPS * size}"
    stream, store = (module([*given, few, *more], folder / "run") for more in ([], [keep]))
    store.heldout_tokens = size  # of which the store would otherwise be filled, too
    store.reader.fill_training()
    filled = STEPS + 1  # and one of held-out text
    rows = interleaved(
        {
            MODEL: lambda: streamed(stream),
            CHECKED: lambda: stored(store, checked=True),
            READ: lambda: stored(store, checked=False),
        },
        ROUNDS,
        "rows",
    )
    forward = statistics.median(forwards(stream) for _ in range(ROUNDS))
    by_turns: list[tuple[float, float]] = []
    for number in range(RUNS + 1):
        both = [
            run_seconds([*given, complete, *more], folder / "outputs") for more in ([], [keep])
        ]
        print(f"runs: round {number} of {RUNS}", flush=True)
        if number:  # the first one filled the store
            by_turns.append((both[0], both[1]))
    layout = store.reader.store.layout
    read = layout.block_bytes // layout.context * len(store.used_layers())
    runs = statistics.median(a for a, _ in by_turns), statistics.median(b for _, b in by_turns)
    return Measured(rows, store.reader.fill_seconds / filled, forward, runs, size, read)


def cells(result: Measured) -> dict[str, str]:
    """Return the column of a model, by row."""
    rate = {name: STEPS * result.tokens / times.median for name, times in result.rows.items()}
    stream, store = result.runs
    return {
        "rows from the language model, tokens/s": f"{rate[MODEL]:,.0f}",
        "rows from the store, first time (checked), tokens/s": f"{rate[CHECKED]:,.0f}",
        "rows from the store, again, tokens/s": f"{rate[READ]:,.0f}",
        "store, checked / language model": f"{rate[CHECKED] / rate[MODEL]:.1f}",
        "checksums: seconds, first time / again": f"{rate[READ] / rate[CHECKED]:.2f}",
        "filling, tokens/s": f"{result.tokens / result.fill:,.0f}",
        "filling / its forwards alone": f"{result.fill / result.forward:.2f}",
        "whole run, streaming: ms of a step": f"{1000 * stream:.1f}",
        "whole run, from the store: ms of a step": f"{1000 * store:.1f}",
        "whole run: streaming / from the store": f"{stream / store:.2f}",
        "bytes read for a token": f"{result.bytes_per_token:,}",
    }


def main() -> None:
    """Measure the models and write the table."""
    given = options(sys.argv[1:], models=(",".join(MODELS), r"[\w,-]+"))
    quiet()
    register_resolver()
    columns = {}
    for name in given["models"].split(","):
        print(name, flush=True)
        with ExitStack() as stack:
            overrides = [f"model={BUNDLED}"]
            if name in SHAPES:
                *sizes, own = SHAPES[name]
                size = dict(zip(Shape._fields, sizes, strict=False))
                model = stack.enter_context(random_model(**size, vocab_size=VOCAB))
                overrides = [*ON_RANDOM, *own, f"model.name={model}"]
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            columns[name] = cells(measured(overrides, Path(folder)))
    rows = next(iter(columns.values()))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {row} | {' | '.join(c[row] for c in columns.values())} |" for row in rows]
    write(
        "store",
        "Activations from disk",
        "\n".join(lines),
        torch.device("cpu"),
        f"bfloat16 on disk, an SAE for each layer, every layer read. Rows: medians of {ROUNDS} "
        f"rounds over {STEPS} steps, which take turns; files lie in the operating system's "
        f"cache. Whole runs: medians of {RUNS}, {RUN_STEPS} steps each, by turns.",
    )


if __name__ == "__main__":
    main()
