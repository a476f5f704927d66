"""Each assumption about the private parts of other libraries, against the installed ones."""

import os
import signal
import subprocess
import sys

import lightning as L
import torch
import wandb
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _suggested_max_num_threads
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.utils.flop_counter import FlopCounterMode

from groupsae.runtime import compat
from groupsae.runtime.ranks import share_cores


def trainer(folder, **options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_epochs=1,
        limit_train_batches=2,
        **options,
    )


class AtSecondStep(L.Callback):
    def __init__(self, act):
        self.act = act

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            self.act(trainer)


def test_lightning_leaves_signals_alone(tmp_path):
    before, seen = signal.getsignal(signal.SIGTERM), []
    look = AtSecondStep(lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    for switched_off in (False, True):
        running = trainer(tmp_path, callbacks=[look], limit_val_batches=0)
        loop = running.fit_loop.epoch_loop
        assert callable(running._signal_connector.register_signal_handlers)
        assert callable(loop._broadcast_sigterm_tensor)
        if switched_off:
            compat.disable_signal_handling(running)
            assert loop._broadcast_sigterm_tensor() is None
        running.fit(BoringModel())
    assert seen[0] != before  # Lightning's own
    assert seen[1] == before


def test_a_stopped_trainer_skips_the_validation(tmp_path):
    class Counting(BoringModel):
        validations = 0

        def on_validation_start(self):
            self.validations += 1

    counts = []
    for skip in (False, True):

        def stop(running, skip=skip):
            running.should_stop = True
            if skip:
                compat.skip_next_validation(running)

        model = Counting()
        trainer(tmp_path, callbacks=[AtSecondStep(stop)], num_sanity_val_steps=0).fit(model)
        counts.append(model.validations)
    assert counts == [1, 0]


def test_lightnings_observer_ends_when_processes_are_released():
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        launcher.procs = [process]
        observer = _ChildProcessObserver(main_pid=-1, child_processes=launcher.procs)
        assert compat.release_started_processes(launcher) == [process]
        process.wait(60)
    assert observer._run()  # done: it would have killed the process with number main_pid


def test_threads_are_shared_as_lightning_does(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is restored
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    try:
        share_cores(2)
        assert torch.get_num_threads() == _suggested_max_num_threads(2)
        assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


def test_a_wandb_logger_can_be_made_offline_before_it_begins(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_SILENT"):  # Lightning sets the mode: restored afterwards
        monkeypatch.setenv(name, "true")
    monkeypatch.delenv("WANDB_MODE")
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    logger = WandbLogger(save_dir=tmp_path, project="test")
    compat.make_wandb_offline(logger)
    try:
        assert logger.experiment.settings.mode == "offline"
    finally:
        wandb.finish()
        wandb.teardown()


def test_onednn_computes_the_product():
    x, weight, bias = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(compat.onednn_linear(x, weight, bias), expected)


def test_operators_without_a_public_name_are_counted():
    def attention(query, key, value, *_, **__):
        assert query == key == value == (1, 2, 4, 8)
        return 1

    def rows(table, indices, *_, **__):
        assert (table, indices) == ((6, 3), (4,))
        return 10

    def linear(x, weight, *_, **__):
        assert (x, weight) == ((5, 3), (4, 3))
        return 100

    @compat.of_tensors
    def product(left, right, **_):
        assert isinstance(left, torch.Tensor)
        assert isinstance(right, torch.Tensor)
        return 1000

    known = compat.private_flop_formulas(attention=attention, rows=rows, linear=linear)
    known[torch.ops.aten.dot] = product
    query, table = torch.randn(1, 2, 4, 8), torch.randn(6, 3)
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        bag = torch.nn.functional.embedding_bag(
            torch.arange(4), table, torch.tensor([0, 2]), mode="sum"
        )
        assert bag.shape == (2, 3)
        compat.onednn_linear(torch.randn(5, 3), torch.randn(4, 3), torch.randn(4))
        torch.dot(torch.randn(3), torch.randn(3))
    assert counter.get_total_flops() == 1111


def test_calls_that_are_compiled_with_their_hooks_are_recognised():
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert not compat.compiles_hooks(plain, outside=True)
    wrapped = torch.compile(plain, backend="eager")
    assert compat.compiles_hooks(wrapped, outside=True)
    assert not compat.compiles_hooks(wrapped, outside=False)  # hooks of the wrapper itself run
    plain.compile(backend="eager")
    assert compat.compiles_hooks(plain, outside=False)
