"""groupsae's training against SAELens, sparsify and dictionary_learning: `make bench-rivals`.

    make bench-rivals                                    environments, then all parts (15 minutes)
    python -m benchmarks.rivals                          the same, the environments being there
    python -m benchmarks.rivals parts=S1,S1-tuned        some parts; the others stay as measured
    python -m benchmarks.rivals parts=loop,loop-tuned    the whole loop only, both ways
    python -m benchmarks.rivals rounds=1 steps=1         a trial
    python -m benchmarks.rivals size=smallest            groupsae alone, a step of S1 and loop: CI
    python -m benchmarks.rivals also="sae.k=16"          groupsae once more, with overrides

Parts are a training step on given activations (S1, S2) and the whole loop from a language model
(loop), each with the C allocator as it is and, `-tuned`, set to keep freed memory. `rounds` is the
number of blocks of each contender (5), `steps` the steps in a block (S1: 6, S2 and loop: 3); every
round begins with another contender. OMP_NUM_THREADS and the like hold for every process.
`also` may be given several times, each with overrides of `groupsae.train` between spaces.

A part's numbers are kept under outputs/rivals/measured when it is done, so a run that was stopped
is continued with parts=<those that are missing>. benchmarks/results/rivals.md and .png are written
again from all of them after every part.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.rivals.contenders import ENVIRONMENTS, HERE, OURS, PARTS, contenders, versions
from benchmarks.rivals.lm import write_lm
from benchmarks.rivals.process import Worker
from benchmarks.rivals.results import kept, write_page
from benchmarks.timing import SMALLEST, processor, smallest
from groupsae import __version__

MEASURED, LOGS = ENVIRONMENTS / "measured", ENVIRONMENTS / "logs"
STEPS = {"S1": 6, "S2": 3, "loop": 3}
WARM_UP, ROUNDS = 2, 5  # steps, blocks of each contender
T = TypeVar("T")


def measure(part: str, lm: Path, rounds: int, steps: int, also: list[list[str]]) -> dict[str, Any]:
    """Return the blocks of all contenders of a part, and the conditions they ran under."""
    taking_part = contenders(part, lm, also)
    if smallest():  # one process of groupsae, without the language model alone
        taking_part = [each for each in taking_part if each.name.startswith(OURS)][:1]
    workers: list[Worker] = []
    begun = time.perf_counter()
    try:
        for i, contender in enumerate(taking_part):
            log = LOGS / f"{part}-{i}-{contender.library}.log"
            workers.append(Worker(contender, tuned=part.endswith("-tuned"), log=log))
        threads = agreed(workers)
        print(f"{part}: {len(workers)} processes ready after {since(begun)} s", flush=True)
        for worker in workers:
            worker.block(1 if smallest() else WARM_UP)
        begun = time.perf_counter()
        blocks: dict[str, list[list[float]]] = {w.contender.name: [] for w in workers}
        for done, order in enumerate(turns(workers, rounds), 1):
            for worker in order:
                blocks[worker.contender.name].append(worker.block(steps))
            left = since(begun) / done * (rounds - done)
            print(f"{part}: round {done} of {rounds}, {left:.0f} s left", flush=True)
    finally:
        for worker in workers:
            worker.stop()
    counted = f"{rounds} rounds of {steps} steps each, after {WARM_UP} steps to warm up"
    return {"blocks": blocks, "conditions": f"{counted}; {hardware(threads)}"}


def turns(all_of_them: Sequence[T], rounds: int) -> Iterator[Sequence[T]]:
    """Yield who follows whom in each round: the same circle, begun one further on each time."""
    for done in range(rounds):
        first = done % len(all_of_them)
        yield [*all_of_them[first:], *all_of_them[:first]]


def agreed(workers: Sequence[Worker]) -> int:
    """Return the threads that all use; stop if they differ in threads, torch or activations."""
    facts = {worker.contender.name: worker.facts() for worker in workers}
    if len({json.dumps(each, sort_keys=True) for each in facts.values()}) > 1:
        raise SystemExit(f"error: the contenders do not run under the same conditions: {facts}")
    return next(iter(facts.values()))["threads"]


def since(begun: float) -> int:
    """Return the whole seconds since then."""
    return round(time.perf_counter() - begun)


def hardware(threads: int) -> str:
    """Return processor, threads, versions and date in one line."""
    rivals = ", ".join(versions().values())
    return (
        f"{processor()}, {os.cpu_count()} cores, {threads} threads; {own_version()}, "
        f"torch {torch.__version__}, {rivals}; {date.today().isoformat()}"
    )


def own_version() -> str:
    """Return groupsae's version, with the commit where this is a git checkout."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(asked, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"groupsae {__version__}"
    return f"groupsae {__version__} at {found.stdout.strip()}"


def main(arguments: Sequence[str]) -> None:
    """Measure the parts, one after the other."""
    pairs = [argument.partition("=")[::2] for argument in arguments if argument != SMALLEST]
    unknown = {key for key, _ in pairs} - {"parts", "rounds", "steps", "also"}
    given = {"parts": ",".join(PARTS), "rounds": str(ROUNDS), **dict(pairs)}
    if smallest():
        given |= {"parts": "S1,loop", "rounds": "1", "steps": "1"}
    parts = given["parts"].split(",")
    if unknown or set(parts) - set(PARTS):
        raise SystemExit(f"error: known are parts={','.join(PARTS)}, rounds=, steps= and also=.")
    also = [value.split() for key, value in pairs if key == "also"]
    command = " ".join(["python -m benchmarks.rivals", *map(quoted, arguments)])
    begun = time.perf_counter()
    MEASURED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if any(part.startswith("loop") for part in parts):
            write_lm(Path(folder))
        for i, part in enumerate(parts):
            steps = int(given.get("steps") or STEPS[part.partition("-")[0]])
            result = measure(part, Path(folder), int(given["rounds"]), steps, also)
            result["conditions"] += f"; `{command}`"
            if not smallest():
                (MEASURED / f"{part}.json").write_text(json.dumps(result))
                write_page(kept(MEASURED))
            spent = since(begun)
            print(f"{part} done; {len(parts) - i - 1} parts to come, {spent} s so far", flush=True)


def quoted(argument: str) -> str:
    """Return an argument as the shell wants it."""
    key, _, value = argument.partition("=")
    return f'{key}="{value}"' if " " in value else argument


if __name__ == "__main__":
    main(sys.argv[1:])
