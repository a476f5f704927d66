"""Lets a language model explain and score latents: `interpretation.judge=endpoint` or `hf`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from groupsae.app.console import print_judged
from groupsae.files.reading import read_json
from groupsae.interpretation.files import COLLECTED, Interpretation
from groupsae.interpretation.judged import judge_run, ledger_of, planned
from groupsae.interpretation.judges import Endpoint, Judge, Local
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from groupsae.runtime.signals import stopped_by_signals


def judge_of(
    folder: Path, options: DictConfig, console: Console, device: torch.device
) -> Judge | None:
    """Return the judge that the options name; None for rules.

    Raises:
        UserError: an option is missing or wrong, or a local model cannot be loaded.
    """
    if options.judge == "rules":
        return None
    ledger = ledger_of(folder)
    if options.judge == "endpoint":
        given: Any = OmegaConf.to_container(options.endpoint)

        def report(line: str) -> None:
            console.print(line, soft_wrap=True, markup=False)

        return Endpoint(ledger, report, seed=options.seed, **given)
    if not options.hf.name:
        raise UserError(
            "interpretation.hf.name has no default: give a folder with a causal language model, "
            "or an id on the Hub."
        )
    hf = options.hf
    lm = FrozenLM(name=str(hf.name), revision=hf.revision, dtype=str(hf.dtype))
    return Local(ledger, lm, device, options.seed)


def try_once(judge: Judge, folder: Path) -> None:
    """Ask the judge one question, unless it has finished before: then it may be gone.

    Raises:
        UserError: it cannot be reached, or refuses access.
    """
    finished = [read_json(file) or {} for file in (folder / "judged").glob("*-*.json")]
    if not any(judge.identity.items() <= one.get("judge", {}).items() for one in finished):
        judge.check()


def ask(
    found: Interpretation,
    explained: Mapping[str, Any],
    judge: Judge,
    options: DictConfig,
    console: Console,
) -> None:
    """Let the judge explain and score latents, and print how it did.

    Raises:
        Stopped: a signal arrived; the same command resumes.
        UserError: the judge cannot be reached, or its answers cannot be read; what it answered
            before is kept.
    """
    total = planned(found, count_of(options), options.seed).questions
    with stopped_by_signals(), Progress(transient=True, console=console) as progress:
        task = progress.add_task(f"asking {judge.name}", total=total)
        judge.advance = lambda count: progress.advance(task, count)
        judged = judge_run(
            found,
            explained,
            judge,
            count_of(options),
            options.seed,
            lambda line: console.print(line, soft_wrap=True, markup=False),
        )
    print_judged(console, judged)


def print_needs(folder: Path, options: DictConfig, console: Console) -> None:
    """Print how many requests and tokens a judge needs."""
    if not (folder / COLLECTED / "collected.json").exists():
        console.print(
            "The judge's requests are counted once the contexts are collected: give the command "
            "with interpretation.judge=rules, then again with dry_run=true.",
            soft_wrap=True,
        )
        return
    found = Interpretation(folder)
    needs = planned(found, count_of(options), options.seed)
    console.print(
        f"Judge: {needs.questions:,} requests for {needs.latents:,} latents, about "
        f"{needs.read:,} tokens to read and {needs.written:,} to write.",
        soft_wrap=True,
    )


def count_of(options: DictConfig) -> int:
    """Return how many latents of each SAE a judge explains: not more than rules do."""
    return int(min(options.judged_latents, options.latents))
