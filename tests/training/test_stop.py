"""Processes that are stopped at different steps end at the same one."""

import signal
from pathlib import Path

import pytest

from groupsae.runtime.errors import UserError
from groupsae.training.suite import GroupSAESuite
from tests.helpers import runs
from tests.helpers.processes import stop_group, stop_second, together


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
def test_a_signal_in_the_last_validation_is_reported_and_costs_nothing(
    number: int,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, "eval_every=6")
    begin, stages = GroupSAESuite.on_validation_epoch_start, []

    def interrupted(self: GroupSAESuite) -> None:
        begin(self)
        stages.append(self.trainer.training)
        if len(stages) == 2:  # the first one belongs to the sixth step
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
def test_a_signal_to_the_complete_process_group_stops_in_order(
    number: int, measuring: bool, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """As Ctrl-C, `timeout` and SLURM send it: the workers that read text get it, too."""
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, "stream.num_workers=2")
    (ended,) = together(stop_group, 1, tmp_path / "log", arguments, number, measuring)
    assert ended.status == 128 + number, ended.output
    assert "Traceback" not in ended.output
    sentence = "stopped before training; resume with" if measuring else "stopped at step 3 of 6"
    assert sentence in ended.output
    assert bool(list(tmp_path.rglob("step=3.ckpt"))) == (not measuring)


def test_a_signal_in_the_last_step_is_reported_and_costs_nothing(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path)
    status, folder = runs.stopped(arguments, step=6)
    assert status == 128 + signal.SIGTERM
    assert f"python -m groupsae.train resume={folder}" in capsys.readouterr().out
    assert runs.read_checkpoint(folder / "checkpoints" / "step=6.ckpt")["global_step"] == 6
    assert not (folder / "summary.json").exists()
    assert runs.run([f"resume={folder}"]) == (0, folder)


@pytest.mark.parametrize(("step", "stopped"), [(1, 2), (5, 6), (6, 6)])
def test_a_signal_to_one_of_two_stops_both_one_step_later(
    step: int, stopped: int, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """In the last step there is no later one."""
    more = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path, *more)
    ended = together(stop_second, 2, tmp_path / "log", arguments, step)
    assert [each.status for each in ended] == [128 + signal.SIGTERM] * 2, ended
    assert "resume=" in ended[0].output
    newest = max(tmp_path.rglob("step=*.ckpt"), key=lambda path: path.name)
    assert newest.name == f"step={stopped}.ckpt"


def test_a_signal_while_layers_are_measured_is_reported(
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from groupsae.training import measure

    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure", lambda *_: signal.raise_signal(signal.SIGTERM))
        status, folder = runs.run(arguments)
    assert status == 128 + signal.SIGTERM
    assert f"resume={folder}" in capsys.readouterr().out
    assert runs.run([f"resume={folder}"]) == (0, folder)


def test_a_refused_dry_run_leaves_a_run_that_has_just_begun_alone(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from groupsae.train import train

    arguments = runs.overrides(tiny_lm, tiny_text, tmp_path)
    with runs.open_run(runs.composed(arguments), arguments) as opened:
        folder = opened.folder
    refused = [*arguments, "dry_run=true", "trainer=ddp", "trainer.accelerator=cpu"]
    refused += ["trainer.devices=3"]
    with pytest.raises(UserError, match="cannot be shared out equally over 3 processes"):
        train(runs.composed(refused), refused)
    assert (folder / ".hydra" / "config.yaml").exists()
