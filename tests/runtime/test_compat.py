"""What we assume about private API of other libraries."""

import subprocess
import sys
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from groupsae.runtime import compat


@pytest.fixture
def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def test_lightning_shares_the_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        compat.share_cores(10**6)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_lightnings_signal_handlers_can_be_turned_off(trainer: L.Trainer) -> None:
    private: Any = trainer
    assert callable(private._signal_connector.register_signal_handlers)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    compat.disable_signal_handling(trainer)
    assert private._signal_connector.register_signal_handlers() is None
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_the_epoch_loop_can_leave_a_validation_out(trainer: L.Trainer) -> None:
    loop: _TrainingEpochLoop = trainer.fit_loop.epoch_loop
    assert loop._skip_next_val is False
    compat.skip_next_validation(trainer)
    assert loop._skip_next_val is True


def test_lightnings_observer_ends_when_processes_are_released() -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        launcher.procs = [process]
        observer = _ChildProcessObserver(main_pid=-1, child_processes=launcher.procs)
        assert compat.release_started_processes(launcher) == [process]
        process.wait(60)
    assert observer._run()  # done: it would have killed the process with number main_pid
