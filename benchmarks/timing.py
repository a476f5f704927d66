"""Timing in interleaved blocks, and the text of results, with the machine.

A machine that is shared, or that changes its clock, is fast in one minute and slow in the next.
So the things compared run in blocks A B C A B C within one process, and figures are medians and
minima over the rounds.
"""

import hashlib
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track

from benchmarks.pretraining.model import build_gpt_neox, train_tokenizer

SMALLEST = "size=smallest"
SMALLEST_RUN = [  # overrides of groupsae.train
    "tokens=1_024", "stream.context=64", "stream.blocks_per_step=4", "stream.blocks_per_forward=4",
    "stream.heldout_tokens=512", "stream.heldout_fraction=0.1",
    "stream.calibration_fraction=0.1", "stream.max_tokens=400_000", "calibration.tokens=512",
    "evaluation.tokens=null", "evaluation.bootstrap.resamples=10",
]  # fmt: skip
RESULTS = Path(__file__).parent / "results"


class Seconds(NamedTuple):
    """Of one thing, over the rounds."""

    median: float
    least: float


def now(device: torch.device) -> float:
    """Return the wall clock, once the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(use: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], float]:
    """Return a block that returns the seconds of one call."""

    def block() -> float:
        start = now(device)
        for _ in range(calls):
            use()
        return (now(device) - start) / calls

    return block


def interleaved(
    blocks: Mapping[str, Callable[[], float]], rounds: int, title: str
) -> dict[str, Seconds]:
    """Run every block in each of the rounds; a block returns the seconds that it measured.

    The first round is not counted. Every round begins with another block. One round is enough
    for the smallest size.
    """
    rounds = 1 if smallest() else rounds
    names, found = list(blocks), {name: [] for name in blocks}
    places = [(r, i) for r in range(rounds + 1) for i in range(len(names))]
    for r, i in track(places, description=title, disable=not sys.stdout.isatty()):
        name = names[(r + i) % len(names)]
        seconds = blocks[name]()
        if r:
            found[name].append(seconds)
        if i == 0 and not sys.stdout.isatty():
            print(f"{title}: round {r} of {rounds}", flush=True)
    return {name: Seconds(statistics.median(s), min(s)) for name, s in found.items()}


@contextmanager
def random_model(
    *, num_layers: int, d_model: int, num_heads: int, vocab_size: int, context: int
) -> Iterator[str]:
    """Give the folder of a GPT-NeoX with random weights and a small tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        build_gpt_neox(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            vocab_size=vocab_size,
            context=context,
        ).save_pretrained(folder)
        texts = [Path(module).read_text() for module in (statistics.__file__, platform.__file__)]
        train_tokenizer(texts, 1024, context).save_pretrained(folder)
        yield folder


def machine(device: torch.device) -> str:
    """Return hardware, versions and date in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{torch.get_num_threads()} threads of {processor()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{hardware}; {versions}, {date.today().isoformat()}"


def processor() -> str:
    """Return the processor's name, and the vector instructions that torch uses."""
    name, about = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if about.exists():
        lines = about.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def smallest() -> bool:
    """Return whether the command line has `size=smallest`: seconds on a CPU, no file is written.

    For CI, which so runs the code of every benchmark; the figures mean nothing.
    """
    return SMALLEST in sys.argv[1:]


def without_size(arguments: Sequence[str]) -> list[str]:
    """Return the arguments but for `size=smallest`."""
    return [argument for argument in arguments if argument != SMALLEST]


def options(arguments: Sequence[str], **allowed: tuple[str, str]) -> dict[str, str]:
    """Return the value of every option but `size`; `allowed` has default and pattern of each.

    Raises:
        SystemExit: an argument is none of them; the message names those that are.
    """
    values = {name: default for name, (default, _) in allowed.items()}
    for argument in without_size(arguments):
        name, _, value = argument.partition("=")
        if name not in allowed or not re.fullmatch(allowed[name][1], value):
            known = ", ".join(f"{known}={pattern}" for known, (_, pattern) in allowed.items())
            raise SystemExit(f"error: '{argument}' is no option of this benchmark: use {known}.")
        values[name] = value
    return values


def variant() -> str:
    """Return what the options of this process add to the names of its results.

    So those of other options never take the place of the default's.
    """
    slug = "".join("_" + re.sub(r"[^\w.]+", "-", a).strip("-") for a in sys.argv[1:])
    if len(slug) <= 120:
        return slug
    # file names have a limit; the hash covers all arguments
    return f"{slug[:100]}-{hashlib.sha256(repr(sys.argv[1:]).encode()).hexdigest()[:8]}"


def write(name: str, title: str, text: str, device: torch.device, notes: str = "") -> None:
    """Print a result, and write it to benchmarks/results with machine and command."""
    command = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
    page = f"# {title}\n\n{text}\n\n{notes}\n\n{machine(device)}. Command: `{command}`\n"
    print(page)
    if not smallest():
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}{variant()}.md").write_text(page)
