"""Build the objects of one configuration, fit, and leave the results in the run folder."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import wandb
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from groupsae.app.console import print_ledger, print_plan, print_result
from groupsae.app.evaluate import evaluate, evaluate_again, is_evaluated, parts_of
from groupsae.app.interpret import interpret
from groupsae.app.needs import print_needs, too_small
from groupsae.app.run_folder import OpenRun
from groupsae.app.stream import make_stream
from groupsae.config.instantiate import make
from groupsae.data.activations import ActivationDataModule
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_metrics, read_yaml
from groupsae.reporting.figures import training_curves
from groupsae.runtime.commands import command
from groupsae.runtime.compat import disable_signal_handling
from groupsae.runtime.errors import UserError
from groupsae.runtime.memory import keep_freed_memory
from groupsae.runtime.output import screen
from groupsae.runtime.quiet import quiet
from groupsae.runtime.ranks import is_leader, share_cores
from groupsae.runtime.signals import Stopped, first_signal, stopped_by_signals
from groupsae.training.callbacks.dashboard import save_figures
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.callbacks.stop import StopOnSignal
from groupsae.training.callbacks.throughput import Throughput
from groupsae.training.checkpoints.io import SuiteCheckpoints, check_same_checkpoint
from groupsae.training.estimate import needs, possible_plans
from groupsae.training.ledger import ledger, seconds_of_all
from groupsae.training.loggers import begin_records
from groupsae.training.parallel.peer_errors import explain_lost_process
from groupsae.training.parallel.placement import busiest
from groupsae.training.parallel.strategies import DDP, SAEParallel
from groupsae.training.results import save_suite, summarise
from groupsae.training.suite import GroupSAESuite


class Run(NamedTuple):
    """The objects of one run."""

    trainer: L.Trainer
    suite: GroupSAESuite
    data: ActivationDataModule
    grouping: GroupLayers
    throughput: Throughput
    stop: StopOnSignal


def fit(opened: OpenRun) -> int:
    """Train one suite, or resume it; return the exit status.

    A finished run is shown again, not repeated. A run that a signal stops leaves a checkpoint,
    if it was training, and returns 128 + the signal's number.
    """
    cfg, folder, checkpoint = opened
    console = screen(quiet=not is_leader())
    quiet()
    run = build(cfg, folder, console, checkpoint)
    trainer, data = run.trainer, run.data
    ours = wandb.run is None  # in a notebook it may be the user's own
    try:
        if (folder / "summary.json").exists() and not cfg.overwrite and not cfg.dry_run:
            _show_finished(run, cfg, folder, console)
            return 0
        announce(run, cfg, console)
        if cfg.dry_run:
            _dry_run(run, cfg, folder, console)
            return 0
        with explain_lost_process(folder), stopped_by_signals():
            trainer.fit(run.suite, datamodule=data, ckpt_path=checkpoint)
            signal = run.stop.received_anywhere()
            if signal is None or trainer.global_step >= data.num_steps:
                last = folder / "checkpoints" / f"step={trainer.global_step}.ckpt"
                trainer.save_checkpoint(last)
            if signal is not None:
                raise Stopped(signal)
            save(run, cfg, folder, console)
            if cfg.evaluate and trainer.is_global_zero:
                evaluate(folder, cfg, cfg.evaluation, str(trainer.strategy.root_device))
            if cfg.interpret and trainer.is_global_zero:
                interpret(folder, cfg, cfg.interpretation, str(trainer.strategy.root_device))
        return 0
    except Stopped as stopped:
        if (folder / "summary.json").exists():
            return _stopped_when_complete(stopped, cfg, folder, console)
        step = trainer.global_step
        where = f"at step {step} of {data.num_steps}" if step else "before training"
        console.print(
            f"stopped {where}; resume with\n  {command('train', resume=folder)}",
            soft_wrap=True,  # a command must come out in one piece
        )
        return 128 + stopped.number
    finally:
        if ours and wandb.run is not None:  # or the next point of a sweep would log into this run
            with first_signal(lambda _: None):  # nothing is left to stop; a second one ends it
                wandb.finish()


def _stopped_when_complete(
    stopped: Stopped, cfg: DictConfig, folder: Path, console: Console
) -> int:
    """Print that the run is complete; return the exit status."""
    console.print(f"The run is complete: {folder}", soft_wrap=True)
    if not cfg.evaluate or is_evaluated(folder, cfg.evaluation):
        return 0
    again = evaluate_again(folder, cfg.evaluation)
    console.print(f"Its evaluation was stopped; to evaluate it:\n  {again}", soft_wrap=True)
    return 128 + stopped.number


def build(cfg: DictConfig, folder: Path, console: Console, checkpoint: Path | None = None) -> Run:
    """Return everything that a run consists of, ready to fit.

    Raises:
        UserError: a value is not allowed, or does not fit the others.
    """
    keep_freed_memory()
    L.seed_everything(cfg.seed, verbose=False)
    say = partial(console.print, soft_wrap=True, highlight=False)
    lm, choice = make(cfg.model), make(cfg.groups)
    choice.check(lm.geometry.num_layers)
    data = make_stream(cfg, lm, say)
    suite = GroupSAESuite(
        sae=make(cfg.sae),
        d_model=lm.geometry.d_model,
        seed=cfg.seed,
        optim=make(cfg.optim),
        dead_after=cfg.dead_after,
        b_dec_start=cfg.b_dec_start,
        nonfinite=cfg.nonfinite,
    )
    grouping = GroupLayers(
        choice=choice,
        folder=str(folder),
        cache=str(Path(cfg.output) / "cache"),
        show=say,
        **cfg.calibration,
    )
    stop, throughput = StopOnSignal(folder=str(folder / "checkpoints")), Throughput()
    loggers: list[Logger] = [make(logger) for logger in (cfg.logger or {}).values()]
    settings = make(cfg.trainer)
    shows_bar = settings.pop("enable_progress_bar", True)
    chosen = [make(callback) for callback in (cfg.callbacks or {}).values() if callback]
    chosen = [each for each in chosen if shows_bar or not isinstance(each, ProgressBar)]

    def check(_trainer: L.Trainer, _: Any, stage: str) -> None:
        """Check values that are known only when processes are connected and the text is packed."""
        if stage == "fit":
            check_same_checkpoint(checkpoint, folder)
            if cfg.evaluate:
                for part in parts_of(cfg.evaluation):
                    part.check(data)

    def record(trainer: L.Trainer, _: Any, stage: str) -> None:
        """Start the loggers after the checks that may refuse a command: text, memory, layers."""
        if stage == "fit":
            trainer.loggers = loggers
            config: Any = OmegaConf.to_container(cfg, resolve=True)
            begin_records(loggers, config, say)

    callbacks = [
        LambdaCallback(setup=check),
        grouping,
        LambdaCallback(setup=record),
        LambdaCallback(on_train_start=lambda *_: _show_groups(grouping, data, console)),
        throughput,
        *chosen,
        stop,
    ]
    try:
        trainer = L.Trainer(
            **settings,
            logger=False,  # not yet: Lightning would let them begin first of all
            max_epochs=1,  # the loader is as long as the run
            log_every_n_steps=min(cfg.log_every, data.num_steps),
            val_check_interval=min(cfg.eval_every, data.num_steps),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,  # Lightning looks for checkpoints there, too
            enable_model_summary=False,
            # or Lightning would add its own where none is chosen
            enable_progress_bar=any(isinstance(each, ProgressBar) for each in chosen),
            enable_checkpointing=any(isinstance(each, Checkpoint) for each in chosen),
            plugins=SuiteCheckpoints(say=say),
            callbacks=callbacks,
        )
        if isinstance(trainer.strategy, DDP):
            trainer.strategy.check_processes()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(
            f"Lightning refuses this trainer ({error}): check trainer, trainer.accelerator and "
            "trainer.devices."
        ) from error
    disable_signal_handling(trainer)
    if cfg.stream.blocks_per_step % trainer.world_size:
        raise UserError(
            f"stream.blocks_per_step={cfg.stream.blocks_per_step} cannot be shared out equally "
            f"over {trainer.world_size} processes: use a multiple."
        )
    return Run(trainer, suite, data, grouping, throughput, stop)


def announce(run: Run, cfg: DictConfig, console: Console) -> None:
    """Print the plan of the training."""
    data, geometry = run.data, run.data.lm.geometry
    tokens = data.num_steps * data.tokens_per_step
    console.print(
        f"{cfg.model.name}: {geometry.num_layers} layers, d_model {geometry.d_model}; "
        f"{tokens:,} tokens per SAE in {data.num_steps:,} steps of {data.tokens_per_step:,}"
        + f", rows of up to {data.layers_per_token} layers from each" * (data.layers_per_token > 1)
        + (f" (the full steps in the {cfg.tokens:,} asked for)" if tokens != cfg.tokens else ""),
        soft_wrap=True,
    )


def _show_groups(grouping: GroupLayers, data: ActivationDataModule, console: Console) -> None:
    """Print the groups, and notes if the activations mislead or the text is too small."""
    print_plan(console, grouping.plan, grouping.cost)
    if chosen := grouping.chosen():
        console.print(chosen, soft_wrap=True, highlight=False)
    losses = grouping.measurement.losses
    if losses and (doubt := losses.warning(data.lm.name, data.packing.prepend_bos)):
        console.print(f"warning: {doubt}", soft_wrap=True, highlight=False)
    overrides = read_yaml(grouping.folder / ".hydra" / "overrides.yaml") or []
    if advice := grouping.advice(overrides):
        console.print(f"warning: {advice}", soft_wrap=True, highlight=False)
    epochs = data.epochs()
    if epochs > 1:
        console.print(
            f"The budget is {epochs:.1f} times the training text: it is read again, newly "
            "shuffled, in each epoch."
        )
    measured = grouping.measurement.provenance["tokens"]
    if measured < grouping.tokens // 2:
        console.print(
            f"Distances and norms come from {measured:,} tokens, all that the calibration split "
            f"holds, instead of {grouping.tokens:,}: raise stream.calibration_fraction or "
            "stream.max_tokens for more."
        )


def save(run: Run, cfg: DictConfig, folder: Path, console: Console) -> None:
    """Validate, and write SAEs, figures, ledger and summary; print the results."""
    trainer, suite, data, grouping, throughput, _ = run
    trainer.validate(suite, datamodule=data, verbose=False)
    if suite.spread or trainer.is_global_zero:
        configured: Any = OmegaConf.to_container(cfg.sae, resolve=True)
        save_suite(folder, suite, grouping, data, configured)
    seconds = seconds_of_all(data, throughput, suite.spread)  # waits for all SAEs to be saved
    if not trainer.is_global_zero:
        return
    metrics = read_metrics(folder / "metrics.csv")
    curves = training_curves(metrics, data.tokens_per_step, data.num_steps)
    save_figures(folder / "figures", {"training": curves}, trainer.loggers)
    costs = ledger(suite, data, grouping, throughput, seconds)
    write_json(folder / "ledger.json", costs)
    summary = summarise(folder, trainer, suite, grouping, throughput)
    write_json(folder / "summary.json", summary)  # the last: it makes the run a finished one
    print_result(console, summary)
    print_ledger(console, costs)


def _show_finished(run: Run, cfg: DictConfig, folder: Path, console: Console) -> None:
    """Show a finished run again; evaluate it if it never was."""
    run.grouping.confirm(run.data)
    print_result(console, json.loads((folder / "summary.json").read_text()))
    console.print("This run was finished before; overwrite=true trains it again.")
    if not cfg.evaluate or not is_leader():
        return
    if is_evaluated(folder, cfg.evaluation):
        console.print(
            "It was evaluated before, too; to evaluate it again:\n"
            f"  {evaluate_again(folder, cfg.evaluation)}",
            soft_wrap=True,
        )
    else:
        evaluate(folder, cfg, cfg.evaluation, str(run.trainer.strategy.root_device))


def _dry_run(run: Run, cfg: DictConfig, folder: Path, console: Console) -> None:
    """Print the run's needs; only the first process does, by a trial of its own share."""
    if not is_leader():
        return
    trainer, data = run.trainer, run.data
    device, processes = trainer.strategy.root_device, trainer.world_size
    data.use(data.lm.load(device), device)
    if device.type == "cpu" and processes > 1:  # they share the cores, as the launcher does it
        share_cores(trainer.num_devices)
    plans = possible_plans(run.grouping.choice, data.lm.geometry.num_layers, folder)
    spread = isinstance(trainer.strategy, SAEParallel)
    found = [
        needs(
            run.suite,
            data,
            plan,
            device,
            processes=processes,
            own=busiest(run.suite, data, plan, processes) if spread else None,
            eval_every=cfg.eval_every,
            checkpoint_every=cfg.checkpoint_every,
            calibration_tokens=cfg.calibration.tokens,
        )
        for plan in plans
    ]
    print_needs(console, found, processes, str(device))
    places = {Path(cfg.output): max(each.run_folder + each.text for each in found)}
    if data.is_stored:
        places[Path(cfg.data.cache)] = max(each.stored for each in found)
    for refusal in too_small(places):
        console.print(refusal, soft_wrap=True)
