"""Look into the latents of a finished run: collect, explain, score, and write pages."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from groupsae import __version__
from groupsae.app.console import print_explanations, print_groupings
from groupsae.app.evaluate import device_named, log_results, same_stream
from groupsae.app.judge import ask, judge_of, print_needs
from groupsae.config.values import INTERPRETATION, check_values, names_of
from groupsae.data.activations import ActivationDataModule
from groupsae.data.packing import end_of_text
from groupsae.evaluation.parts import chosen_groupings
from groupsae.files.atomic import atomic_write, write_json
from groupsae.files.reading import read_json
from groupsae.grouping.groupings import groupings
from groupsae.interpretation.collect import Kept
from groupsae.interpretation.comparison import write_frames
from groupsae.interpretation.directions import directions_of
from groupsae.interpretation.explain import (
    PART,
    SECONDS,
    choose,
    explain_part,
    explain_sae,
    start_worker,
)
from groupsae.interpretation.files import (
    COLLECTED,
    FORMAT,
    Interpretation,
    of_layer,
    save_collected,
)
from groupsae.interpretation.page import write_page
from groupsae.interpretation.reading import Pass
from groupsae.interpretation.text import Text
from groupsae.reporting.figures import explained_figures
from groupsae.reporting.load import RunFiles, read_run
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.runtime.progress import token_progress
from groupsae.runtime.quiet import quiet
from groupsae.runtime.signals import first_signal
from groupsae.runtime.units import format_bytes, format_seconds
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import Suite, load_saes

MOST_SCORED = 1_000_000  # held-out tokens, if not asked for more


def interpret(
    folder: Path,
    cfg: DictConfig,
    options: DictConfig,
    device: str,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    rank: int = 0,
    count: int = 1,
) -> None:
    """Collect what the latents of a finished run do, explain some, and write their page.

    With `dry_run` only the needs are printed; with `overwrite` nothing collected before is used.
    Of `count` processes, which collect together, the first (`rank` 0) does all else.

    Raises:
        Stopped: a signal arrived; the same command resumes.
        UserError: an option is not allowed, a file of the run is missing or damaged, the SAEs
            belong to another model or text, or the text is too short.
    """
    console = screen()
    quiet()
    check_values(options, INTERPRETATION, "interpretation.")
    place = device_named(device)
    plan = load_plan(folder)
    if plan is None:
        raise UserError(f"{folder} has no groups.json: it is not a run folder.")
    wanted, key = names_of(options.groupings), "interpretation.groupings"
    chosen = chosen_groupings(groupings(plan), wanted, key)
    names = list(dict.fromkeys(sae for each in chosen for sae in each.sae_of_layer.values()))
    saes = {name: load_saes(folder / "saes", [name]).to(place) for name in names}
    data = same_stream(folder, cfg, saes[names[0]].configs[names[0]], place)
    target = folder / "interpretation"
    judge = judge_of(target, options, console, place) if rank == 0 else None
    if judge is not None and not dry_run:
        judge.check()
    collect(
        target, data, saes, options, console,
        dry_run=dry_run, overwrite=overwrite, rank=rank, count=count,
    )  # fmt: skip
    if rank > 0:
        return
    if dry_run:
        if judge is not None:
            print_needs(len(saes), options, console)
        return
    found = Interpretation(target)
    explain(found, options, console)
    print_explanations(console, found.explanations)
    directions = {name: suite.directions(name) for name, suite in saes.items()}
    title = f"{data.lm.name}: {', '.join(names) if len(names) < 5 else f'{len(names)} SAEs'}"

    def write() -> None:
        write_frames(found, groupings(plan), directions, options.seed)
        console.print(f"Latents: {write_page(found, title)}", soft_wrap=True)

    write()
    if judge is not None:
        ask(found, judge, options, console)
        write()
    run = read_run(folder)
    print_groupings(console, run)
    _log(run, cfg.logger or {})


def _log(run: RunFiles, configs: Any) -> None:
    """Send the means over each grouping, and W&B the tables and the histograms of F1 by SAE."""
    tables = run.explained
    numbers = {
        f"interpret/{metric}/{row['grouping']}": float(value)
        for row in tables["groupings"].to_dict("records")
        for metric, value in row.items()
        if isinstance(value, int | float) and not metric.endswith(("_low", "_high"))
        if metric != "num_groups" and value == value
    }
    samples = {
        f"interpret/f1/{name}": frame["f1"].tolist()
        for name, frame in tables["latents"].groupby("sae")
    }
    step = run.summary["steps"] + 1  # as an evaluation, one step later than training
    frames = {f"interpret/{name}": frame for name, frame in tables.items()}
    log_results(run.folder, configs, numbers, step, explained_figures(run), frames, samples)


def explain(found: Interpretation, options: DictConfig, console: Console) -> None:
    """Write explanations and scores of every SAE; SAEs that are done already are not repeated."""
    file = found.folder / "explanations.json"
    key = [found.head["key"], options.latents]
    stored = read_json(file) or {}
    done = stored.get("saes", {}) if stored.get("key") == key else {}
    left = [sae for name, sae in found.saes.items() if name not in done]
    if not left:
        return
    total = sum(len(choose(sae, options.latents).latents) for sae in left)
    with (
        _workers(total // PART, found.folder, options.seed) as each,
        Progress(transient=True, console=console) as progress,
    ):
        task = progress.add_task("explaining latents", total=total)

        def run(name: str, parts: list[list[int]]) -> Iterator[list[dict[str, Any]]]:
            for rows in each(partial(explain_part, name), parts):
                progress.advance(task, len(rows))
                yield rows

        for sae in left:
            done[sae.name], resampled = explain_sae(
                found, sae.name, options.latents, partial(run, sae.name)
            )
            with atomic_write(found.folder / "resampled" / f"{sae.name}.npy") as handle:
                np.save(handle, resampled)
            write_json(file, {"format": FORMAT, "key": key, "judge": "rules", "saes": done})


@contextmanager
def _workers(most: int, folder: Path, seed: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a `map` over processes that explain latents, one for each core.

    A new process imports the main module again. If that is not a command of ours but a user's
    script, which may lack a guard and would start over, this process does the work.
    """
    main = sys.modules["__main__"]
    command = getattr(main.__spec__, "name", None) or Path(getattr(main, "__file__", "")).name
    processes = min(_cores(), most)
    if processes < 2 or not str(command).startswith(("groupsae.", "groupsae-")):
        start_worker(folder, seed)
        yield map
        return
    context = get_context("spawn")  # a fork would copy torch's threads
    with ProcessPoolExecutor(processes, context, start_worker, (folder, seed)) as pool:
        yield pool.map


def collect(
    folder: Path,
    data: ActivationDataModule,
    saes: Mapping[str, Suite],
    options: DictConfig,
    console: Console,
    *,
    dry_run: bool,
    overwrite: bool,
    rank: int,
    count: int,
) -> None:
    """Collect what the latents do, unless it was collected before.

    Raises:
        Stopped: a signal arrived; the same command resumes.
        UserError: the text is too short, or a file cannot be written.
    """
    score = MOST_SCORED if options.score_tokens is None else options.score_tokens
    score = min(score, data.blocks.blocks["heldout"].size)
    explain = score if options.explain_tokens is None else options.explain_tokens
    text = Text(data, explain, score)
    kept = Kept(**{k: options[k] for k in ("top", "sample", "across", "latents", "seed")})
    head = {
        **data.described(),
        "weights": data.lm.fingerprint(),
        "text": data.blocks.key,
        "end_token": end_of_text(data.lm.tokenizer()),
        "num_tokens": text.tokens,
        "kept": vars(kept),
    }
    parts = [FORMAT, head, {name: _digest(suite, name) for name, suite in saes.items()}]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    done = read_json(folder / COLLECTED / "collected.json") or {}
    if done.get("key") == key and not overwrite:
        shutil.rmtree(folder / "collecting", ignore_errors=True)  # of a stopped overwrite=true
        console.print(f"Contexts: {folder / COLLECTED} (collected before)", soft_wrap=True)
        return
    if done and not overwrite:
        console.print("The contexts there are of other options, SAEs or text: collecting again.")

    with tempfile.TemporaryDirectory() as temporary:
        needs = Pass(Path(temporary), key, data, text, saes, kept).trial()
    _print_needs(console, text, len(saes), *needs)
    if dry_run:
        _print_rules(console, saes, kept.latents)
        return
    found = Pass(folder / "collecting", key, data, text, saes, kept, rank, count)
    received: list[int] = []
    total = sum(text.tokens)
    if found.resume():
        console.print(f"resuming at part {found.next_part} of {text.num_parts}")
    done_tokens = found.next_part * text.size * text.context
    with (
        first_signal(received.append),
        token_progress("collecting", total, show=rank == 0, done=done_tokens) as advance,
    ):
        found.run(
            lambda tokens: advance(tokens * count), lambda: received[0] if received else None
        )
    if count > 1:  # wait until every process has saved what it found
        torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    found.join()
    head = {"key": key, "groupsae": __version__, "context": text.context, **head}
    _save(folder, head, found, data, text, saes)
    console.print(f"Contexts: {folder / COLLECTED}", soft_wrap=True)


def _print_needs(
    console: Console, text: Text, saes: int, seconds: float, memory: float, disk: float
) -> None:
    """Print what a pass over the text needs."""
    console.print(
        f"{saes} SAEs on {sum(text.tokens):,} tokens ({text.tokens[0]:,} to explain, "
        f"{text.tokens[1]:,} held-out): {format_bytes(memory)} of memory for contexts, counts and "
        f"firings, {format_bytes(disk)} on disk, about {format_seconds(seconds)}",
        soft_wrap=True,
    )


def _print_rules(console: Console, saes: Mapping[str, Suite], latents: int) -> None:
    """Print what explaining so many latents of each SAE by rules needs."""
    explained = sum(
        min(latents, suite.saes[name].d_sae) * (len(suite.layers) + (len(suite.layers) > 1))
        for name, suite in saes.items()
    )
    processes = min(_cores(), explained)
    spent = format_seconds(explained * SECONDS / processes)
    console.print(
        f"Rules: {explained:,} explanations at most, about {spent} with {processes} processes",
        soft_wrap=True,
    )


def _save(
    folder: Path,
    head: dict[str, Any],
    found: Pass,
    data: ActivationDataModule,
    text: Text,
    saes: Mapping[str, Suite],
) -> None:
    """Write what was collected, with the directions of latents and the text of their tokens."""
    directions = {}
    for name, suite in saes.items():
        directions[name] = directions_of(suite.directions(name), data.hooked)
        mapped = suite.saes[name].maps is not None and suite.saes[name].layer_rank > 0
        for layer in suite.layers if mapped else ():
            decoder = F.normalize(suite[layer].W_dec, dim=1)
            directions[of_layer(name, layer)] = directions_of(decoder, data.hooked)
    shown = set(text.read().flatten().tolist())
    for each in directions.values():
        shown |= {*each.promoted.flatten().tolist(), *each.suppressed.flatten().tolist()}
    strings = token_strings(data.lm.tokenizer(), shown)
    save_collected(folder, head, found, directions, strings)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    found = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(found) or os.cpu_count() or 1


def _digest(suite: Suite, name: str) -> str:
    """Return a hash of an SAE's weights."""
    digest = hashlib.sha256()
    for tensor in suite.saes[name].state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def token_strings(tokenizer: PreTrainedTokenizerBase, tokens: set[int]) -> dict[int, str]:
    """Return the text of each token; bytes that are no text on their own as `<0xE2>`."""
    found = {}
    for token in sorted(tokens):
        text = str(tokenizer.decode([token]))
        if "\ufffd" in text or not text:
            # (models have more tokens than their tokenizers, whose text is empty)
            text = _bytes_shown(str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>"))
        found[token] = text
    return found


def _bytes_shown(token: str) -> str:
    """Return a token of byte-level BPE with its bytes as text where they are; others unchanged."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if not set(token) <= set(byte_of):
        return token
    text = bytes(byte_of[character] for character in token).decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
