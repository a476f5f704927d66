"""Build the objects of a finished run, evaluate its SAEs, and leave the results in its folder."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import wandb
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from groupsae import __version__
from groupsae.config import make
from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.errors import UserError
from groupsae.evaluation.cost import planned_flops, relative_costs
from groupsae.evaluation.files import save_evaluation
from groupsae.evaluation.heldout import HeldoutSums, run_heldout
from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.options import check_options
from groupsae.evaluation.results import Results
from groupsae.grouping.groupings import groupings
from groupsae.grouping.plan import GroupPlan
from groupsae.interop.suite import Suite, load_plan, load_saes
from groupsae.report.collection import evaluation_figures
from groupsae.report.dashboard import save_figures
from groupsae.report.load import read_run
from groupsae.report.reading import read_json
from groupsae.report.tables import print_evaluation
from groupsae.screen import quiet


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    folder: Path
    plan: GroupPlan
    saes: dict[str, Suite]
    data: ActivationDataModule


def assess(folder: Path, cfg: DictConfig, options: DictConfig, device: str) -> dict[str, Any]:
    """Evaluate every SAE of a finished run: write `evaluation/`, log it and print the tables.

    Args:
        folder: of the run.
        cfg: its configuration, with the loggers to use.
        options: conf/evaluation.
        device: auto, cpu, cuda or cuda:<index>.

    Returns:
        What is in `evaluation/evaluation.json`.

    Raises:
        UserError: an option is not allowed, a file of the run is missing or damaged, the SAEs
            belong to another model or text, or there is less held-out text than asked for.
    """
    console, watch = Console(), Stopwatch()
    quiet()
    # Logging goes on in the W&B run of the training, if that is still open.
    warnings.filterwarnings("ignore", ".*wandb run already in progress.*")
    place = _device(device)
    plain: Any = OmegaConf.to_container(options)
    check_options(plain)
    resampling: dict[str, Any] = dict(options.bootstrap)
    ledger, summary = (_file(folder / name) for name in ("ledger.json", "summary.json"))
    subject = _open(folder, cfg, place)
    data, plan = subject.data, subject.plan
    steps = _steps(data, options.tokens, options.tokens or cfg.stream.heldout_tokens)
    if options.exclude_special_tokens is not None:
        data.exclude_special_tokens = options.exclude_special_tokens
    found = groupings(plan)
    sums = HeldoutSums(subject.saes, found, options.together, options.similarity_tokens)
    with watch:
        tokens = steps * data.tokens_per_step
        flops = _run(subject, sums, steps, place, f"evaluating {len(sums.pairs)} pairs")
        results = Results(sums, Bootstrap(steps * data.blocks_per_step, **resampling))
        figures = results.to_json(relative_costs(ledger, found, subject.saes))
    geometry = data.lm.geometry
    head = {
        "groupsae": __version__,
        "run": str(folder),
        "model": data.lm.name,
        "revision": data.lm.revision,
        "num_layers": geometry.num_layers,
        "d_model": geometry.d_model,
        "last_layer": plan.last_layer,
        "theta": plan.theta,
        "sequences": steps * data.blocks_per_step,
        "context": data.packing.context,
        "tokens": results.tokens(),
        "predictions": int(sums.predictions.values.sum()),
        "exclude_special_tokens": data.exclude_special_tokens,
        "bootstrap": resampling,
        "cost": {
            "planned_flops": tokens
            * planned_flops(
                geometry,
                data.packing.context,
                subject.saes,
                found if options.together else [],
            ),
            "measured_flops": flops,
            "seconds": watch.seconds,
        },
    }
    evaluation = save_evaluation(folder / "evaluation", head, figures, results)
    # one step later than training, so that evaluating again replaces these rows and no others
    loggers = [make(logger) for logger in (cfg.logger or {}).values()]
    _log(folder, evaluation, loggers, summary["steps"] + 1)
    print_evaluation(console, evaluation)
    return evaluation


def _log(folder: Path, evaluation: dict[str, Any], loggers: list[Any], step: int) -> None:
    """Send the chosen grouping's figures per layer, every grouping's means, and the figures."""
    chosen = evaluation["groupings"][0]["sae_of_layer"]
    values = {
        f"eval/{metric}/layer.{row['layer']}": row[metric]["value"]
        for row in evaluation["results"]
        if chosen.get(str(row["layer"])) == row["sae"]
        for metric in ("fvu", "delta_ce", "kl")
    }
    for each in evaluation["groupings"]:
        for metric in ("fvu", "delta_ce", "kl"):
            values[f"eval/{metric}/{each['name']}"] = each["all_layers"][metric]["value"]
    ours = wandb.run is None
    try:
        for logger in loggers:
            logger.log_metrics({k: v for k, v in values.items() if v is not None}, step=step)
        save_figures(folder / "figures", evaluation_figures(read_run(folder)), loggers)
    finally:
        if ours and wandb.run is not None:  # or the next point of a sweep would log into this run
            wandb.finish()


def _file(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if values is None:
        raise UserError(
            f"{path} is missing, which a finished run leaves: copy it from where the run was "
            "made, or train again."
        )
    return values


def _device(name: object) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(str(name))
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}; use auto, cpu, cuda or cuda:<index>.")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        there = f"the last GPU here is cuda:{count - 1}" if count else "there is no GPU here"
        raise UserError(f"device is {name}, but {there}: use device=cpu or auto.")
    return found


def _open(folder: Path, cfg: DictConfig, device: torch.device) -> Subject:
    """Return the SAEs with the model and the text that they were trained on, and on no other."""
    plan = load_plan(folder)
    if plan is None:
        raise UserError(f"{folder} has no groups.json: it is not a run folder.")
    saes = {
        planned.name: load_saes(folder / "saes", [planned.name]).to(device)
        for planned in plan.members
    }
    lm = make(cfg.model)
    data = ActivationDataModule(
        lm=lm,
        source=make(cfg.data),
        cache=str(Path(cfg.output) / "cache"),
        tokens=cfg.tokens,
        seed=cfg.seed,
        **cfg.stream,
    )
    trained = next(iter(saes.values())).configs[plan.members[0].name]
    weights = lm.fingerprint()
    if trained["weights"] != weights:
        raise UserError(
            f"the SAEs in {folder} were trained on other weights of {trained['model']} "
            f"({trained['weights'][:8]}) than {lm.name} has now ({weights[:8]}): bring the old "
            "ones back, or train again."
        )
    if trained["text"] != data.blocks.key:
        raise UserError(
            f"the SAEs in {folder} were trained on packed text {trained['text']}, but data now "
            f"gives {data.blocks.key}: files have changed, and held-out text might be text they "
            "were trained on. Bring the old text back, or train again."
        )
    model, blocks = lm.load_with_head(device)
    data.use(model, blocks, device)
    return Subject(folder, plan, saes, data)


def _steps(data: ActivationDataModule, asked: int | None, wanted: int) -> int:
    """Return the steps to evaluate on; what was asked for must be there, a default need not."""
    available = data.steps_for("heldout", None) * data.tokens_per_step
    if asked is not None and asked > available:
        raise UserError(
            f"evaluation.tokens={asked:,} is more than the {available:,} tokens that the held-out "
            f"split has: ask for at most {available:,}, or train with a larger "
            "stream.heldout_fraction or more text."
        )
    if asked is not None and asked < data.tokens_per_step:
        raise UserError(
            f"evaluation.tokens={asked:,} is less than one step of {data.tokens_per_step:,} "
            f"tokens: ask for at least {data.tokens_per_step:,}."
        )
    return data.steps_for("heldout", wanted)


def _run(subject: Subject, sums: HeldoutSums, steps: int, device: torch.device, title: str) -> int:
    data = subject.data
    means = _layer_means(data, steps * data.tokens_per_step)
    columns = (
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=steps * data.tokens_per_step, rate="")

        def advance(tokens: int) -> None:
            speed = progress.tasks[task].speed or 0.0
            progress.update(task, advance=tokens, rate=f"{speed:,.0f} tokens/s")

        def parts() -> Iterator[Tensor]:
            for batch in data.loader("heldout", steps, None):
                yield from batch.to(device).split(data.blocks_per_forward)

        special = data.special_ids if data.exclude_special_tokens else None
        return run_heldout(sums, parts(), data.model, data.lm_blocks, means, special, advance)


def _layer_means(data: ActivationDataModule, tokens: int) -> Tensor:
    """Return the mean activation of every layer, [layer, d_model], over calibration text.

    Not over held-out text: what mean ablation puts in must not know what it is measured on.
    """
    total, count = torch.zeros(()), 0
    for batch in data.calibration_batches(tokens):
        acts = batch.acts if batch.keep is None else batch.acts[:, batch.keep]
        total = total.to(acts.device) + acts.double().sum(1)
        count += acts.shape[1]
    return (total / count).float()
