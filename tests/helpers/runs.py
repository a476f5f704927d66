"""Small real runs for the tests: the yaml files, a 4-layer model, a few steps."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import open_run, register_resolver
from groupsae.config.instantiate import CONF


def overrides(lm: Path, text: Path, output: Path, *more: str) -> list[str]:
    """Return the command line of a six-step run (the smallest with two checkpoints)."""
    return [
        f"output={output}",
        "model=hf",
        f"model.name={lm}",
        "data=files",
        f"data.path={text}",
        "tokens=3072",
        "stream.context=64",
        "stream.blocks_per_step=8",
        "stream.blocks_per_forward=4",
        "stream.heldout_fraction=0.1",
        "stream.calibration_fraction=0.1",
        "stream.heldout_tokens=1024",
        "stream.num_workers=0",
        "calibration.tokens=1024",
        "sae.expansion=2",
        "sae.k=4",
        "dead_after=1000",
        "optim.base_lr=1e-3",
        "log_every=1",
        "eval_every=6",
        "checkpoint_every=3",
        "+trainer.enable_progress_bar=false",
        *more,
    ]


def composed(arguments: list[str]) -> DictConfig:
    """Return the configuration that a command line gives."""
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("train", arguments)


def run(arguments: list[str]) -> tuple[int, Path]:
    """Train as the command line would; return the exit status and the run folder."""
    from groupsae.app.fit import fit

    with open_run(composed(arguments), arguments) as opened:
        return fit(opened), opened.folder


def stopped(
    arguments: list[str],
    step: int = 3,
    tell: Callable[[], None] = lambda: signal.raise_signal(signal.SIGTERM),
    by: Callable[[list[str]], Any] = run,
) -> Any:
    """Train until a signal comes in some step; return the exit status and the run folder.

    `by` trains, and its result is returned.
    """
    from groupsae.training.callbacks.stop import StopOnSignal

    inherited = StopOnSignal.on_train_batch_end

    def stop(self: StopOnSignal, trainer: Any, *args: Any) -> None:
        if trainer.global_step == step:
            tell()
        inherited(self, trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_train_batch_end", stop)
        return by(arguments)


def saved(folder: Path) -> dict[str, Any]:
    """Return every SAE's tensors in a finished run folder, by group and name."""
    from safetensors.torch import load_file

    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("saes/*/sae.safetensors"))
        for name, tensor in load_file(file).items()
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a complete checkpoint as Lightning restores it."""
    from groupsae.training.checkpoints.io import SuiteCheckpoints

    return SuiteCheckpoints(say=print).load_checkpoint(path)


def rewrite_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Put another checkpoint in the place of one."""
    from groupsae.training.checkpoints.io import SuiteCheckpoints

    checkpoints = SuiteCheckpoints(say=print)
    checkpoints.remove_checkpoint(path)
    checkpoints.save_checkpoint(checkpoint, path)


def flip_a_bit(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def config_of(folder: Path) -> DictConfig:
    """Return the configuration that a run folder remembers."""
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg
