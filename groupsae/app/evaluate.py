"""Build the objects of a finished run, evaluate its SAEs, and leave the results in its folder."""

import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

from groupsae import __version__
from groupsae.app.console import print_evaluation
from groupsae.app.stream import make_stream
from groupsae.config.instantiate import make
from groupsae.config.values import EVALUATION, check_values
from groupsae.cost.counter import flop_counter
from groupsae.cost.model import activation_flops
from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.cost import planned_flops, relative_costs
from groupsae.evaluation.files import begin_evaluation, save_evaluation
from groupsae.evaluation.heldout import HeldoutSums, run_heldout
from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.results import Results
from groupsae.files.reading import require_json
from groupsae.grouping.groupings import groupings
from groupsae.reporting.figures import evaluation_figures
from groupsae.reporting.load import read_run, value_of
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.runtime.progress import token_progress
from groupsae.runtime.quiet import quiet
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import load_saes
from groupsae.training.callbacks.dashboard import save_figures


def evaluate(folder: Path, cfg: DictConfig, options: DictConfig, device: str) -> dict[str, Any]:
    """Evaluate every SAE of a finished run: write `evaluation/`, log it and print the tables.

    Returns:
        The content of `evaluation/evaluation.json`.

    Raises:
        UserError: an option is not allowed, a file of the run is missing or damaged, the SAEs
            belong to another model or text, or there is less held-out text than asked for.
    """
    console, watch = screen(), Stopwatch()
    quiet()
    place = device_named(device)
    check_values(options, EVALUATION, "evaluation.")
    summary = require_json(folder / "summary.json")
    # the training cost of imported SAEs is unknown
    ledger = None if "adopted" in summary else require_json(folder / "ledger.json")
    plan = load_plan(folder)
    if plan is None:
        raise UserError(f"{folder} has no groups.json: it is not a run folder.")
    names = [planned.name for planned in plan.members]
    saes = {name: load_saes(folder / "saes", [name]).to(place) for name in names}
    data = same_stream(folder, cfg, saes[names[0]].configs[names[0]], place)
    steps = steps_to_evaluate(data, options.tokens)
    if options.exclude_special_tokens is not None:
        data.exclude_special_tokens = options.exclude_special_tokens
    found = groupings(plan)
    costs = relative_costs(ledger, found, saes) if ledger is not None else {}
    bootstrap = Bootstrap(data.heldout_documents(steps), **options.bootstrap)
    if not data.hooked.predicts:
        console.print(
            f"{data.lm.name} predicts no next token (stack: {data.lm.stack}): reconstruction is "
            "measured, cross-entropy and KL are left empty."
        )
    spliced = options.together and data.hooked.predicts
    sums = HeldoutSums(saes, found, spliced, options.similarity_tokens)
    geometry, context = data.lm.geometry, data.packing.context
    tokens = steps * data.tokens_per_step
    begin_evaluation(folder / "evaluation")
    with watch:
        means, averaged, flops = _layer_means(data, tokens)
        flops += _run(data, sums, steps, means)
        results = Results(sums, bootstrap)
        figures = results.to_json(costs)
    together = found if spliced else []
    planned = averaged * activation_flops(geometry.num_layers, geometry.d_model, context)
    planned += tokens * planned_flops(geometry, context, saes, together, data.hooked)
    head = {
        "groupsae": __version__,
        "run": str(folder),
        **data.described(),
        "text": data.blocks.key,
        "num_layers": geometry.num_layers,
        "d_model": geometry.d_model,
        "last_layer": plan.last_layer,
        "theta": plan.theta,
        "sequences": bootstrap.sequences,
        "documents": bootstrap.documents,
        "tokens": sums.tokens,
        "predictions": int(sums.clean["predictions"].sum()),
        "bootstrap": dict(options.bootstrap),
        "cost": {"planned_flops": planned, "measured_flops": flops, "seconds": watch.seconds},
    }
    evaluation = save_evaluation(folder / "evaluation", head, figures, results)
    # one step later than training, so that evaluating again replaces these rows of the csv only
    _log(folder, evaluation, cfg.logger or {}, summary["steps"] + 1)
    print_evaluation(console, evaluation)
    console.print(f"Results: {folder / 'evaluation'}", soft_wrap=True)
    return evaluation


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
    figures["ce/clean"] = evaluation["ce"]
    for row in evaluation["layers"]:
        figures |= {f"{k}/layer.{row['layer']}": v for k, v in row.items() if k.startswith("ce_")}
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


def log_results(
    folder: Path,
    configs: Mapping[str, Any],
    numbers: Mapping[str, float],
    step: int,
    figures: Mapping[str, Figure],
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
        save_figures(folder / "figures", dict(figures), loggers)
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
    data = make_stream(cfg, lm, screen().print, trained)
    weights = lm.fingerprint()
    if trained["weights"] not in (None, weights, lm.earlier_fingerprint()):
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


def steps_to_evaluate(data: ActivationDataModule, tokens: int | None) -> int:
    """Return the steps to evaluate on; by default fewer if the text is shorter.

    The text is packed first if necessary.

    Raises:
        UserError: the held-out split has fewer tokens, or they are less than one step.
    """
    available = data.steps_for("heldout", None) * data.tokens_per_step
    if tokens is not None and tokens > available:
        raise UserError(
            f"evaluation.tokens={tokens:,} is more than the {available:,} tokens that the "
            f"held-out split has: ask for at most {available:,}, or train with a larger "
            "stream.heldout_fraction or more text."
        )
    if tokens is not None and tokens < data.tokens_per_step:
        raise UserError(
            f"evaluation.tokens={tokens:,} is less than one step of {data.tokens_per_step:,} "
            f"tokens: ask for at least {data.tokens_per_step:,}."
        )
    return data.steps_for("heldout", data.heldout_tokens if tokens is None else tokens)


def _run(data: ActivationDataModule, sums: HeldoutSums, steps: int, means: Tensor) -> int:
    """Add the held-out text to the sums; return the FLOPs."""
    parts = (
        part
        for batch in data.loader("heldout", steps)
        for part in batch.to(means.device).split(data.blocks_per_forward)
    )
    title, total = f"evaluating {len(sums.pairs)} pairs", steps * data.tokens_per_step
    with token_progress(title, total, show=True) as advance:
        return run_heldout(sums, parts, data.hooked, means, data.filters, advance)


def _layer_means(data: ActivationDataModule, tokens: int) -> tuple[Tensor, int, int]:
    """Return the mean activation of every layer, [layer, d_model]; its tokens; its FLOPs.

    From calibration text: the means must not come from the text of the evaluation.
    """
    total, count, seen = torch.zeros(()), 0, 0
    batches = data.calibration_batches(tokens)
    with flop_counter() as counter:
        first = next(batches)
    with token_progress("averaging layers", tokens, show=True) as advance:
        for batch in chain([first], batches):
            seen += batch.acts.shape[1]
            keep = batch.everywhere()
            acts = batch.acts if keep is None else batch.acts[:, keep]
            total = total.to(acts.device) + acts.sum(1, dtype=torch.float64)
            count += acts.shape[1]
            advance(batch.acts.shape[1])
    per_token = counter.get_total_flops() / first.acts.shape[1]
    return (total / count).float(), seen, round(seen * per_token)
