"""Lets a language model explain and score latents: `interpretation.judge=endpoint` or `hf`."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from groupsae.app.console import print_judged
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.judge_windows import DELPHI, Protocol
from groupsae.interpretation.judges import Endpoint, Judge, Ledger, Local
from groupsae.interpretation.judging import judge_run, planned
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
    ledger = Ledger(folder / "judged" / "answers.jsonl")
    if options.judge == "endpoint":
        given: Any = OmegaConf.to_container(options.endpoint)
        report = partial(console.print, soft_wrap=True)
        return Endpoint(ledger, report, seed=options.seed, **given)
    if not options.hf.name:
        raise UserError(
            "interpretation.hf.name has no default: give a folder with a causal language model, "
            "or an id on the Hub."
        )
    hf = options.hf
    lm = FrozenLM(name=str(hf.name), revision=hf.revision, dtype=str(hf.dtype))
    return Local(ledger, lm, device, options.seed)


def ask(found: Interpretation, judge: Judge, options: DictConfig, console: Console) -> None:
    """Let the judge explain and score latents, and print how it did.

    Raises:
        Stopped: a signal arrived; the same command resumes.
        UserError: the judge cannot be reached, or its answers cannot be read; what it answered
            before is kept.
    """
    protocol, count = _protocol(options)
    total, *_ = planned(protocol, len(found.saes) * count)
    with stopped_by_signals(), Progress(transient=True, console=console) as progress:
        task = progress.add_task(f"asking {judge.name}", total=total)
        judge.advance = lambda count: progress.advance(task, count)
        report = partial(console.print, soft_wrap=True)
        judged = judge_run(found, judge, protocol, count, options.seed, report)
    print_judged(console, judged)


def print_needs(saes: int, options: DictConfig, console: Console) -> None:
    """Print how many requests and tokens a judge of so many SAEs needs."""
    protocol, count = _protocol(options)
    requests, read, written = planned(protocol, saes * count)
    console.print(
        f"Judge: {requests:,} requests at most, about {read:,} tokens to read and {written:,} to "
        "write",
        soft_wrap=True,
    )


def _protocol(options: DictConfig) -> tuple[Protocol, int]:
    """Return which windows a judge sees, and of how many latents: not more than rules explain."""
    protocol = DELPHI if options.delphi_compat else Protocol()
    return protocol, min(options.judged_latents, options.latents)
