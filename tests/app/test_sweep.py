"""Sweeps: a failed point does not stop the others, a stop does, and the table lists all.

The points are real runs of a few steps, on a small random model.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from groupsae.app import sweep
from groupsae.files.locks import one_at_a_time
from groupsae.runtime.errors import UserError
from tests.helpers import runs
from tests.helpers.callbacks import TARGET, act


@pytest.fixture
def command(tiny_lm, tiny_text, tmp_path, monkeypatch, capfd):
    """Return a function that gives a training command in this process.

    It returns the exit status and what was printed.
    """
    from groupsae.train import main

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    monkeypatch.setenv("GROUPSAE_TARGETS", TARGET)
    start = runs.overrides(tiny_lm, tiny_text, tmp_path, "groups=count", "groups.num_groups=1")
    start += ["tokens=1024", "checkpoint_every=1"]

    def give(*arguments):
        monkeypatch.setattr(sweep, "_current", None)
        options = [each for each in arguments if each.startswith("--")]
        overrides = [*start, *(each for each in arguments if each not in options)]
        monkeypatch.setattr(sys, "argv", ["train", "-m", *options, *overrides])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    yield give
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows(printed):
    """Return seed -> result of its point."""
    cells = [line.split("│")[1:3] for line in printed.splitlines() if "seed=" in line]
    found = [(cell[0].strip(), cell[1].strip()) for cell in cells if len(cell) == 2]
    return {int(point.removeprefix("seed=")): word for point, word in found}


def table(printed):
    """Return the cells of the table, in one line."""
    cells = printed.split("run folder, or why")[1].split("└")[0]
    return " ".join(cells.replace("│", " ").split())


def test_a_failed_point_does_not_stop_the_others(command, tmp_path):
    crash = act(do="out of luck", seed=1)
    status, printed = command("groups.num_groups=1,9", "seed=0,1", *crash)
    assert status == 1
    cells = table(printed)
    assert cells.count(" done ") == 1, printed
    assert cells.count(" failed ") == 3, cells
    assert "RuntimeError: out of luck" in cells
    assert "num_groups is 9" in cells
    assert f"python -m groupsae.train -m output={tmp_path} model=hf" in printed
    (first,) = tmp_path.rglob("summary.json")
    written = first.stat().st_mtime_ns
    status, printed = command("seed=0,1", *act(do="out of luck", seed=7))
    assert (status, rows(printed)) == (0, {0: "done", 1: "done"})
    assert "The same command" not in printed
    assert first.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_stopped_point_stops_the_sweep(command, tmp_path):
    stop = act(do="SIGTERM", seed=1)
    status, printed = command("seed=0,1,2", *stop)
    assert status == 128 + signal.SIGTERM
    assert rows(printed) == {0: "done", 1: "stopped", 2: "not run"}
    assert "resume it with resume=" in table(printed)
    assert len(list(tmp_path.rglob("summary.json"))) == 1
    status, printed = command("seed=0,1,2", *stop)  # which is resumed after its first step
    assert (status, rows(printed)) == (0, {0: "done", 1: "done", 2: "done"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_stops_the_sweep(command, number):
    status, printed = command("seed=0,1,2", *act(do=number.name, when="built"))
    assert status == 128 + number
    assert rows(printed) == {0: "stopped", 1: "not run", 2: "not run"}


def test_a_signal_while_a_command_is_started_reaches_it(monkeypatch):
    start, outside = subprocess.Popen, []

    def interrupted(line):
        child = start(line)
        signal.raise_signal(signal.SIGTERM)
        return child

    before = signal.signal(signal.SIGTERM, lambda number, _frame: outside.append(number))
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    try:
        assert sweep.run_command(["sleep", "5"]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outside == []


def test_a_point_that_submitit_stops_is_queued_again(command):
    """Its own handler is called when the checkpoint is written."""
    received = []
    signal.signal(signal.SIGUSR2, lambda number, _frame: received.append(number))
    command("seed=0,1", *act(do="SIGUSR2", seed=0))
    assert received == [signal.SIGUSR2]


@pytest.mark.slow
def test_a_point_of_several_processes_is_a_command_of_its_own(command, tmp_path):
    """It gets the user's yaml files and Hydra's options, but for those of the sweep."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\nlog_every: 2\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    status, printed = command(
        "seed=5",
        "experiment=mine",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        f"--config-dir={tmp_path / 'conf'}",
        "hydra.verbose=false",
        f"hydra.sweep.dir={tmp_path / 'x'}",
    )
    assert status == 0, printed
    (summary,) = tmp_path.rglob("summary.json")
    cfg = runs.config_of(summary.parent)
    assert (cfg.seed, cfg.log_every, cfg.trainer.devices) == (5, 1, 2)  # the command line wins
    given = (summary.parent / ".hydra" / "overrides.yaml").read_text()
    assert "experiment=mine" in given
    assert "hydra" not in given


WAITS = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("ended in order")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""


def when_ready(note, act):
    """Call a function once the process that writes a note has its handlers."""

    def wait():
        while not Path(f"{note}.ready").exists():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_reaches_the_command_of_a_point_and_waits_for_it(tmp_path, number):
    """So does the one of submitit, which is the answer then."""
    before = {n: signal.getsignal(n) for n in (number, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, lambda *_: None)
    handler, note = signal.getsignal(number), tmp_path / "note"
    thread = when_ready(note, lambda: os.kill(os.getpid(), number))
    assert sweep.run_command([sys.executable, "-c", WAITS, str(note)]) == 128 + number
    thread.join()
    assert note.read_text() == "ended in order"
    assert signal.getsignal(number) == handler
    for each, was in before.items():
        signal.signal(each, was)


def test_the_command_of_a_point_does_not_outlive_an_error(tmp_path):
    def fail(*_):
        raise RuntimeError("something else")

    note, before = tmp_path / "note", signal.signal(signal.SIGALRM, fail)
    thread = when_ready(note, lambda: os.kill(os.getpid(), signal.SIGALRM))
    with pytest.raises(RuntimeError, match="something else"):
        sweep.run_command([sys.executable, "-c", WAITS, str(note)])
    thread.join()
    signal.signal(signal.SIGALRM, before)
    assert note.read_text() == "ended in order"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_jobs_elsewhere_alone(number, tmp_path, monkeypatch, capfd):
    recorder = sweep.SweepRecorder()
    recorder.folder, recorder.launcher = tmp_path, "hydra_plugins.hydra_submitit_launcher"
    recorder.points = [["seed=0"], ["seed=1"]]
    (tmp_path / "point-0.json").write_text(
        json.dumps({"status": 0, "reason": "", "folder": "f", "point": ["seed=0"]})
    )
    monkeypatch.setattr(sweep, "_current", recorder)
    handled = sweep.handled_by(recorder._interrupted, requeue=False)
    with pytest.raises(KeyboardInterrupt), handled:
        signal.raise_signal(number)
    assert sweep.received() == number
    assert not recorder.stop.exists()  # jobs that have not begun yet read this
    status, shown = recorder.table()
    assert status == 1
    sweep.screen().print(shown)
    printed = capfd.readouterr().out
    assert rows(printed) == {0: "done", 1: "unknown"}
    assert "still running" in table(printed)


def test_a_secret_in_a_sweep_is_refused_before_anything_is_written(command, tmp_path):
    status, printed = command("+data.token=abc", "seed=0,1")
    assert status == 2
    assert "HF_TOKEN" in printed
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_cannot_work_is_refused(monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda _: None)
    for launcher, extra in (("parallel", "joblib"), ("slurm", "submitit")):
        with pytest.raises(UserError, match=rf"pip install 'groupsae\[{extra}\]'"):
            sweep.check_launcher(["-m", f"hydra/launcher={launcher}"])
    monkeypatch.setattr(sweep, "find_spec", lambda name: name)
    sweep.check_launcher(["-m", "hydra/launcher=parallel"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    sweep.check_launcher(["seed=1"])
    with pytest.raises(UserError, match="under torchrun"):
        sweep.check_launcher(["-m", "seed=1,2"])


# ---- runs side by side -------------------------------------------------------------------------


MEASURES = """
import sys, time
from pathlib import Path
from groupsae.files.locks import one_at_a_time
lock, asked, made, stored = map(Path, sys.argv[1:])
with one_at_a_time(lock, "at it"):
    print("has it", flush=True)
    while not asked.exists():
        time.sleep(0.02)
    time.sleep(0.5)  # the run waits for the lock meanwhile
    made.rename(stored)
"""


def test_layers_are_not_measured_again_when_another_run_just_did(
    tiny_lm, tiny_text, tmp_path, monkeypatch
):
    import groupsae.training.measure as measure

    first = runs.overrides(tiny_lm, tiny_text, tmp_path, "tokens=512", "groups=count")
    status, folder = runs.run([*first, "groups.num_groups=1"])
    assert status == 0
    (stored,) = (tmp_path / "cache" / "angles").glob("*.npz")
    made = stored.rename(tmp_path / "made.npz")
    lock, asked = stored.with_suffix(".lock"), tmp_path / "asked"

    def waiting(path, *about):
        assert path == lock
        asked.touch()
        return one_at_a_time(path, *about)

    monkeypatch.setattr(measure, "one_at_a_time", waiting)
    monkeypatch.setattr(measure, "_measure", lambda *_: pytest.fail("measured again"))
    with subprocess.Popen(
        [sys.executable, "-c", MEASURES, *map(str, (lock, asked, made, stored))],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        assert runs.run([*first, "groups.num_groups=2"])[0] == 0
    assert other.returncode == 0


# ---- the launchers themselves ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "module"),
    [("parallel", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")],
)
def test_points_run_elsewhere(launcher, module, tiny_lm, tiny_text, tmp_path):
    """Two points that run and one that fails, then again: only what failed is tried."""
    try:
        importlib.import_module(f"hydra_plugins.{module}")
    except ImportError:
        pytest.skip(f"needs hydra_plugins.{module}")
    line = runs.overrides(tiny_lm, tiny_text, tmp_path, "groups=count", "groups.num_groups=1,9,2")
    command = [sys.executable, "-m", "groupsae.train", "-m", *line, f"hydra/launcher={launcher}"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        table = done.stdout.split("run folder, or why")[-1]
        assert done.returncode == 1, done.stderr
        assert table.count("│ done ") == 2
        assert table.count("│ failed ") == 1
        assert "num_groups is 9" in " ".join(table.split()).replace("│", "")
        finished = list(tmp_path.rglob("summary.json"))
        assert len(finished) == 2
    assert len(list((tmp_path / "cache" / "angles").glob("*.npz"))) == 1
    assert len({os.stat(Path(file)).st_mtime for file in finished}) == 2
