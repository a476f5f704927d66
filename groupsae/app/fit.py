"""Build the objects of one configuration, fit, and leave the results in the run folder."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import wandb
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from groupsae.app.console import print_ledger, print_plan, print_result
from groupsae.app.evaluate import assess, steps_to_evaluate
from groupsae.app.needs import print_needs, too_small
from groupsae.config.arguments import make, make_source
from groupsae.data.activations import ActivationDataModule
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_metrics
from groupsae.reporting.figures import training_curves
from groupsae.runtime.compat import disable_signal_handling
from groupsae.runtime.errors import UserError
from groupsae.runtime.quiet import quiet
from groupsae.runtime.ranks import is_leader, share_cores
from groupsae.runtime.signals import Stopped, stopped_by_signals
from groupsae.training.allocator import keep_freed_memory
from groupsae.training.callbacks.bar import Bar
from groupsae.training.callbacks.dashboard import Dashboard, save_figures
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.callbacks.stop import StopOnSignal
from groupsae.training.callbacks.throughput import Throughput
from groupsae.training.checkpoints.distributed_save import same_checkpoint
from groupsae.training.checkpoints.io import SuiteCheckpoints
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


def fit(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> int:
    """Train (or go on training) one suite; return the exit status.

    A finished run is shown again, not repeated. A run that was told to stop leaves a checkpoint,
    if it was training, and returns 128 + the signal's number.
    """
    console = Console(quiet=not is_leader())
    quiet()
    run = build(cfg, folder, checkpoint, console)
    try:
        if (folder / "summary.json").exists() and not cfg.overwrite and not cfg.dry_run:
            return _show_finished(run, cfg, folder, console)
        announce(run, cfg, console)
        if cfg.dry_run:
            return _dry_run(run, cfg, folder, console)
        with explain_lost_process(folder), stopped_by_signals():
            return _train(run, cfg, folder, checkpoint, console)
    except Stopped as stopped:
        console.print(
            "stopped before or after the training steps; what is written is whole; go on with\n"
            f"  python -m groupsae.train resume={folder}",
            soft_wrap=True,
        )
        return 128 + stopped.number
    finally:
        if wandb.run is not None:  # or the next point of a sweep would log into this run
            wandb.finish()


def _dry_run(run: Run, cfg: DictConfig, folder: Path, console: Console) -> int:
    """Print what the run will need; the first process does, by a trial of its own share."""
    if not is_leader():
        return 0
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
            own=busiest(run.suite, plan, processes) if spread else None,
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
    return 0


def _show_finished(run: Run, cfg: DictConfig, folder: Path, console: Console) -> int:
    """Show a finished run again; evaluate it if it never was."""
    run.grouping.confirm(run.data)
    print_result(console, json.loads((folder / "summary.json").read_text()))
    console.print("This run was finished before; overwrite=true trains it again.")
    if cfg.evaluate and is_leader():
        if (folder / "evaluation" / "evaluation.json").exists():
            console.print(
                "It was evaluated before, too; to evaluate it again:\n"
                f"  python -m groupsae.evaluate run={folder}",
                soft_wrap=True,
            )
        else:
            assess(folder, cfg, cfg.evaluation, str(run.trainer.strategy.root_device))
    return 0


def _train(
    run: Run, cfg: DictConfig, folder: Path, checkpoint: Path | None, console: Console
) -> int:
    trainer, suite, data = run.trainer, run.suite, run.data
    trainer.fit(suite, datamodule=data, ckpt_path=checkpoint)
    received = run.stop.received_anywhere()
    if received is not None and trainer.global_step < data.num_steps:
        console.print(
            f"stopped at step {trainer.global_step} of {data.num_steps}; go on with\n"
            f"  python -m groupsae.train resume={folder}",
            soft_wrap=True,  # a command must come out in one piece
        )
        return 128 + received
    trainer.save_checkpoint(folder / "checkpoints" / f"step={trainer.global_step}.ckpt")
    if received is not None:
        raise Stopped(received)
    trainer.validate(suite, datamodule=data, verbose=False)
    if suite.spread or trainer.is_global_zero:
        configured: Any = OmegaConf.to_container(cfg.sae, resolve=True)
        save_suite(folder, suite, run.grouping, data, configured)
    seconds = seconds_of_all(data, run.throughput, suite.spread)  # waits for all SAEs to be saved
    if trainer.is_global_zero:
        figures = {
            "training": training_curves(
                read_metrics(folder / "metrics.csv"), data.tokens_per_step, data.num_steps
            )
        }
        save_figures(folder / "figures", figures, trainer.loggers)
        costs = ledger(suite, data, run.grouping, run.throughput, seconds)
        write_json(folder / "ledger.json", costs)
        summary = summarise(folder, trainer, suite, run.grouping, run.throughput)
        write_json(folder / "summary.json", summary)
        print_result(console, summary)
        print_ledger(console, costs)
        if cfg.evaluate:
            assess(folder, cfg, cfg.evaluation, str(trainer.strategy.root_device))
    return 0


def build(cfg: DictConfig, folder: Path, checkpoint: Path | None, console: Console) -> Run:
    """Return everything that a run consists of, ready to fit."""
    keep_freed_memory()
    L.seed_everything(cfg.seed, verbose=False)
    lm, choice = make(cfg.model), make(cfg.groups)
    choice.check(lm.geometry.num_layers)
    cache = Path(cfg.output) / "cache"
    data = ActivationDataModule(
        lm=lm,
        source=make_source(cfg.data),
        cache=str(cache),
        tokens=cfg.tokens,
        seed=cfg.seed,
        **cfg.stream,
    )
    if cfg.data.get("cache") is not None:
        say = partial(console.print, soft_wrap=True, highlight=False)
        data.keep_in(cfg.data.cache, cfg.data.cache_dtype, say)
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
        cache=str(cache),
        say=console.print,
        **cfg.calibration,
    )
    stop, throughput = StopOnSignal(folder=str(folder / "checkpoints")), Throughput()
    loggers: list[Logger] = [make(logger) for logger in (cfg.logger or {}).values()]
    settings = make(cfg.trainer)

    def check(_trainer: L.Trainer, _: Any, stage: str) -> None:
        """Look at what can only be known once processes have met and the text is packed."""
        if stage != "fit":
            return
        same_checkpoint(checkpoint, folder)
        if cfg.evaluate:
            steps_to_evaluate(data, cfg.evaluation.tokens)

    def record(trainer: L.Trainer, _: Any, stage: str) -> None:
        """Let the loggers begin after what may refuse a command: text, memory, layers."""
        if stage == "fit":
            trainer.loggers = loggers
            config: Any = OmegaConf.to_container(cfg, resolve=True)
            begin_records(loggers, config, partial(console.print, soft_wrap=True))

    callbacks: list[L.Callback] = [
        LambdaCallback(setup=check),
        grouping,
        LambdaCallback(setup=record),
        throughput,
        Dashboard(
            grouping=grouping,
            folder=folder,
            say=console.print,
            show_plan=partial(print_plan, console),
        ),
        ModelCheckpoint(
            dirpath=folder / "checkpoints",
            filename="{step}",
            every_n_train_steps=cfg.checkpoint_every,
            save_top_k=-1,  # what is too old is removed where checkpoints are written
            enable_version_counter=False,
        ),
        stop,
        *([Bar()] if settings.get("enable_progress_bar", True) else []),
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
            default_root_dir=folder,  # not the place of the command: Lightning looks there, too
            enable_model_summary=False,
            plugins=SuiteCheckpoints(say=partial(console.print, soft_wrap=True)),
            callbacks=callbacks,
        )
        if isinstance(trainer.strategy, DDP):
            trainer.strategy.check_processes()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(
            f"Lightning refuses this trainer ({error}): look at trainer, trainer.accelerator and "
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
    """Say what is about to be trained."""
    data, geometry = run.data, run.data.lm.geometry
    tokens = data.num_steps * data.tokens_per_step
    console.print(
        f"{cfg.model.name}: {geometry.num_layers} layers, d_model {geometry.d_model}; "
        f"{tokens:,} tokens per SAE in {data.num_steps:,} steps of {data.tokens_per_step:,}"
        + (f" (whole steps of the {cfg.tokens:,} asked for)" if tokens != cfg.tokens else "")
    )
