"""Build the objects of a finished run, evaluate its SAEs, and leave the results in its folder."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from groupsae.app.console import print_evaluation, print_part
from groupsae.app.stream import make_stream
from groupsae.config.instantiate import make
from groupsae.config.values import check_evaluation, evaluation_parts
from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.files import flat, results_file, save_part, tables_in
from groupsae.evaluation.parts import Part, Run
from groupsae.evaluation.text import Heldout
from groupsae.files.reading import require_json
from groupsae.grouping.groupings import groupings
from groupsae.reporting.figures import Captioned, downstream_figures, evaluation_figures
from groupsae.reporting.load import read_run, value_of
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.runtime.quiet import quiet
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import load_saes
from groupsae.training.callbacks.dashboard import save_figures


def evaluate(
    folder: Path, cfg: DictConfig, options: DictConfig, device: str
) -> dict[str, dict[str, Any]]:
    """Run the chosen parts of the evaluation of a finished run: write, log and print each.

    Args:
        folder: the run folder.
        cfg: the run's configuration.
        options: `evaluation` of a configuration.
        device: auto, cpu, cuda or cuda:<index>.

    Returns:
        The results of each part, by its name: the content of its json file in `evaluation/`.

    Raises:
        UserError: an option is not allowed, a file of the run is missing or damaged, the SAEs
            belong to another model or text, or a part cannot run.
    """
    console = screen()
    quiet()
    place, parts = device_named(device), parts_of(options)
    summary = require_json(folder / "summary.json")
    run = trained_run(folder, cfg, place)
    for part in parts:
        part.check(run.data)
    # one step later than training, so that evaluating again replaces these rows of the csv
    step, loggers, found = summary["steps"] + 1, cfg.logger or {}, {}
    for part in parts:
        if isinstance(part, Heldout):
            results = part.run(run)
            _log(folder, results, loggers, step)
            print_evaluation(console, results)
        else:
            results = save_part(folder, part.name, run.described() | part.measure(run))
            _log_part(folder, part.name, results, loggers, step)
            print_part(console, part.name, results)
        found[part.name] = results
    console.print(f"Results: {folder / 'evaluation'}", soft_wrap=True)
    return found


def parts_of(options: DictConfig) -> list[Heldout | Part]:
    """Return the parts that `evaluation` of a configuration chooses.

    Raises:
        UserError: one of their values is not allowed.
    """
    check_evaluation(options)
    return [make(part) for part in evaluation_parts(options).values()]


def is_evaluated(folder: Path, options: DictConfig) -> bool:
    """Return whether a run has the results of all parts that `evaluation` chooses."""
    return all(results_file(folder, name).exists() for name in evaluation_parts(options))


def evaluate_again(folder: Path, options: DictConfig) -> str:
    """Return the command that evaluates a run with the chosen parts."""
    names = list(evaluation_parts(options))
    chosen = [] if names == ["heldout"] else [f"evaluation=[{','.join(names)}]"]
    return command("evaluate", *chosen, run=folder)


def trained_run(folder: Path, cfg: DictConfig, place: torch.device) -> Run:
    """Return a finished run with its model loaded, ready to be evaluated.

    Raises:
        UserError: a file is missing or damaged, or the SAEs belong to another model or text.
    """
    plan = load_plan(folder)
    if plan is None:
        raise UserError(f"{folder} has no groups.json: it is not a run folder.")
    names = [planned.name for planned in plan.members]
    saes = {name: load_saes(folder / "saes", [name]).to(place) for name in names}
    data = same_stream(folder, cfg, saes[names[0]].configs[names[0]], place)
    return Run(
        saes=saes,
        groupings=groupings(plan),
        lm=data.hooked,
        tokenizer=data.lm.tokenizer,
        filters=data.filters,
        folder=folder,
        plan=plan,
        data=data,
        say=screen().print,
    )


def _log(folder: Path, evaluation: dict[str, Any], configs: Any, step: int) -> None:
    """Send the chosen grouping's figures per layer, every grouping's means, and the plots."""
    chosen = evaluation["groupings"][0]["sae_of_layer"]
    figures = {
        f"{metric}/layer.{row['layer']}": value
        for row in evaluation["results"]
        if chosen.get(str(row["layer"])) == row["sae"]
        for metric, value in row.items()
        if metric not in ("sae", "layer")
    }
    figures |= {f"{k}/clean": evaluation[k] for k in ("ce", "retrieval") if k in evaluation}
    for row in evaluation["layers"]:
        ends = {name: row[name] for name in row if name.endswith(("_zero", "_mean"))}
        figures |= {f"{name}/layer.{row['layer']}": value for name, value in ends.items()}
    for grouping in evaluation["groupings"]:
        name, together = grouping["name"], grouping["spliced_together"] or {}
        figures |= {f"{metric}/{name}": v for metric, v in grouping["all_layers"].items()}
        figures |= {f"{metric}_together/{name}": v for metric, v in together.items()}
    numbers = {
        f"eval/{name}": number
        for name, stored in figures.items()
        if (number := value_of(stored)) is not None
    }
    log_results(folder, configs, numbers, step, evaluation_figures(read_run(folder)))


def _log_part(folder: Path, name: str, found: Mapping[str, Any], configs: Any, step: int) -> None:
    """Send what a part found for each grouping, and W&B its tables."""
    numbers = {
        f"eval/{name}/{metric}/{row['grouping']}": number
        for row in found["groupings"]
        for metric, stored in row.items()
        if isinstance(stored, Mapping) and (number := value_of(stored)) is not None
    }
    frames = {
        f"{name}/{table}": pd.DataFrame([flat(row) for row in rows])
        for table, rows in tables_in(found).items()
    }
    log_results(folder, configs, numbers, step, downstream_figures(read_run(folder)), frames)


def log_results(
    folder: Path,
    configs: Mapping[str, Any],
    numbers: Mapping[str, float],
    step: int,
    figures: Iterable[Captioned],
    tables: Mapping[str, pd.DataFrame] = MappingProxyType({}),
    samples: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> None:
    """Send the results of a command to the loggers of a run, and write its figures.

    W&B also gets the tables, and the samples as histograms.
    """
    # the W&B run of the training, if it is still open, is logged to
    warnings.filterwarnings("ignore", ".*wandb run already in progress.*")
    ours = wandb.run is None
    try:
        loggers = [make(config) for config in configs.values()]
        for logger in loggers:
            logger.log_metrics(numbers, step=step)
        save_figures(folder / "figures", {each.name: each.figure for each in figures}, loggers)
        for logger in (each for each in loggers if isinstance(each, WandbLogger)):
            for name, frame in tables.items():
                logger.log_table(name, dataframe=frame)
            logger.experiment.log({k: wandb.Histogram(list(v)) for k, v in samples.items()})
    finally:
        if ours and wandb.run is not None:  # or the next point of a sweep would log into this run
            wandb.finish()


def device_named(name: object) -> torch.device:
    """Return the device of a command's `device`.

    Raises:
        UserError: it is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"device is {name!r}; use auto, cpu, cuda or cuda:<index>.")
    device, count = torch.device(str(name)), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        last = f"the last GPU here is cuda:{count - 1}" if count else "no GPU is available"
        raise UserError(f"device is {name}, but {last}: use device=cpu or auto.")
    return device


def same_stream(
    folder: Path, cfg: DictConfig, trained: Mapping[str, Any], device: torch.device
) -> ActivationDataModule:
    """Return the activations of the model and the text that the SAEs were trained on.

    Raises:
        UserError: the model or the text is another one now.
    """
    lm = make(cfg.model)
    data = make_stream(cfg, lm, screen().print)
    weights = lm.fingerprint()
    if trained["weights"] not in (None, weights):
        raise UserError(
            f"the SAEs in {folder} were trained on other weights of {trained['model']} "
            f"({trained['weights'][:8]}) than {lm.name} has now ({weights[:8]}): restore "
            "them, or train on these in another output=<folder>."
        )
    imported = trained.get("adopted") is not None
    if imported and trained["text"] == data.blocks.key:
        screen().print("The text is the one that the imported SAEs were trained on, split alike.")
    elif imported:
        screen().print(
            "The text of the evaluation may be part of the training text of the imported SAEs."
        )
    elif trained["text"] not in (None, data.blocks.key):
        raise UserError(
            f"the SAEs in {folder} were trained on packed text {trained['text']}, but data now "
            f"gives {data.blocks.key}: files have changed, and held-out text might be text they "
            "were trained on. Restore the old text, or train on this in another output=<folder>."
        )
    data.use(lm.load_with_head(device), device)
    return data
