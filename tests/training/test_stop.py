"""Processes that were told to stop at different steps end at the same one."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch

from groupsae.runtime.errors import UserError
from groupsae.training.callbacks.stop import StopOnSignal, Stopped, stopped_by_signals
from groupsae.training.suite import GroupSAESuite
from tests.helpers import runs
from tests.helpers.processes import stop_group, stop_second, together


@pytest.mark.parametrize("told", [{0: 2}, {1: 2}, {0: 2, 1: 3}, {}])
def test_all_stop_at_the_step_after_one_was_told(
    told: dict[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two threads in step stand for the processes, which know of each other by the sums only."""
    me, barrier, given = local(), Barrier(2), [torch.empty(0)] * 2

    def all_reduce(value: torch.Tensor) -> None:
        given[me.rank] = value.clone()
        barrier.wait(30)
        value.copy_(given[0] + given[1])
        barrier.wait(30)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def process(rank: int) -> list[int]:
        me.rank, saved = rank, []
        stop = StopOnSignal(folder=str(tmp_path))
        trainer = SimpleNamespace(
            world_size=2,
            should_stop=False,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            save_checkpoint=lambda file: saved.append(int(file.stem.split("=")[1])),
            val_check_batch=4,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()),
        )
        for step in range(6):
            if told.get(rank) == step:
                stop._note(signal.SIGTERM, None)
            trainer.global_step = step
            stop.on_train_batch_end(trainer)  # type: ignore[arg-type]
            if trainer.should_stop:
                break
        assert (stop.received == signal.SIGTERM) == bool(told)
        return saved

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, (0, 1))) == [[3] if told else []] * 2


def test_an_echo_of_a_signal_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended, moments = [], iter([10.0, 11.0, 13.0, 13.0])
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr("groupsae.training.callbacks.stop.time", clock)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    stop = StopOnSignal(folder=str(tmp_path))
    stop._note(signal.SIGTERM, None)
    stop._note(signal.SIGTERM, None)
    assert not ended
    stop._note(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_is_done_inside_and_the_handlers_come_back(number: int) -> None:
    before, after = signal.getsignal(number), []

    def work() -> None:
        with stopped_by_signals():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # its echo does not disturb the end
                after.append(True)

    with pytest.raises(Stopped) as stopped:
        work()
    assert stopped.value.number == number
    assert after
    assert signal.getsignal(number) == before


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the steps at which the suite is validated."""
    seen: list[int] = []
    begin = GroupSAESuite.on_validation_epoch_start

    def counted(self: GroupSAESuite) -> None:
        seen.append(self.trainer.global_step)
        begin(self)

    monkeypatch.setattr(GroupSAESuite, "on_validation_epoch_start", counted)
    return seen


@pytest.mark.parametrize(("every", "validated"), [(6, []), (3, [3])])
def test_a_stop_validates_only_what_is_due(
    every: int,
    validated: list[int],
    validations: list[int],
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    """There may be no time for it; what is due would be missing in the log afterwards."""
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, f"eval_every={every}")
    assert runs.stopped(arguments)[0] == 128 + signal.SIGTERM
    assert validations == validated


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_validation_is_told_and_costs_nothing(
    number: int,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, "eval_every=6")
    begin, told = GroupSAESuite.on_validation_epoch_start, []

    def interrupted(self: GroupSAESuite) -> None:
        begin(self)
        told.append(self.trainer.training)
        if len(told) == 2:  # the first one belongs to the sixth step
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(GroupSAESuite, "on_validation_epoch_start", interrupted)
        status, folder = runs.run(arguments)
    assert status == 128 + number
    assert f"python -m groupsae.train resume={folder}" in capsys.readouterr().out
    assert not (folder / "summary.json").exists()
    assert runs.run(arguments) == (0, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("measuring", [False, True])
def test_a_signal_to_the_whole_group_stops_in_order(
    number: int, measuring: bool, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """As Ctrl-C, `timeout` and SLURM send it: the workers that read text get it, too."""
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, "stream.num_workers=2")
    (ended,) = together(stop_group, 1, tmp_path / "log", arguments, number, measuring)
    assert ended.status == 128 + number, ended.output
    assert "Traceback" not in ended.output
    said = "stopped before or after" if measuring else "stopped at step 3 of 6"
    assert said in ended.output
    assert bool(list(tmp_path.rglob("step=3.ckpt"))) == (not measuring)


def test_a_signal_in_the_last_step_is_told_and_costs_nothing(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path)
    status, folder = runs.stopped(arguments, step=6)
    assert status == 128 + signal.SIGTERM
    assert f"python -m groupsae.train resume={folder}" in capsys.readouterr().out
    assert runs.read_checkpoint(folder / "checkpoints" / "step=6.ckpt")["global_step"] == 6
    assert not (folder / "summary.json").exists()
    assert runs.run([f"resume={folder}"]) == (0, folder)


@pytest.mark.parametrize("step", [5, 6])
def test_a_signal_to_one_of_two_in_the_last_steps_stops_both(
    step: int, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """What is told in the last step is read in the next one, and there is none."""
    more = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, *more)
    ended = together(stop_second, 2, tmp_path / "log", arguments, step)
    assert [each.status for each in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "resume=" in ended[0].output
    assert list(tmp_path.rglob("step=6.ckpt"))


def test_a_signal_while_layers_are_measured_is_told(
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from groupsae.training import measure

    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measured", lambda *_: signal.raise_signal(signal.SIGTERM))
        status, folder = runs.run(arguments)
    assert status == 128 + signal.SIGTERM
    assert f"resume={folder}" in capsys.readouterr().out
    assert runs.run([f"resume={folder}"]) == (0, folder)


def test_a_refused_dry_run_leaves_a_run_that_has_just_begun_alone(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from groupsae import train

    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path)
    _, folder, _ = runs.open_run(runs.composed(arguments), arguments)
    refused = [*arguments, "dry_run=true", "trainer=ddp", "trainer.accelerator=cpu"]
    refused += ["trainer.devices=3"]
    with pytest.raises(UserError, match="cannot be shared out equally over 3 processes"):
        train.train(runs.composed(refused), refused)
    assert (folder / ".hydra" / "config.yaml").exists()
