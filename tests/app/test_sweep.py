"""Sweeps: a failed point does not stop the others, a stop does, and all are told of."""

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
from groupsae.app import sweep_process as sweep_child
from groupsae.files.locks import one_at_a_time
from groupsae.runtime.errors import UserError
from tests.helpers import runs


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Return a function that gives a training command in this process, with a `fit` of the test.

    It returns the exit status, what was said and the seeds of the points that were begun.
    """
    import groupsae.app.fit as fit
    from groupsae.train import main

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}

    def give(ends, *arguments):
        begun = []

        def fake(cfg, folder, _checkpoint):
            begun.append(cfg.seed)
            end = ends.get(cfg.seed, 0)
            if isinstance(end, Exception):
                raise end
            return end() if callable(end) else end

        monkeypatch.setattr(fit, "fit", fake)
        monkeypatch.setattr(sweep, "_current", None)
        line = ["train", "-m", f"output={tmp_path}", "model=tiny", *arguments]
        monkeypatch.setattr(sys, "argv", line)
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        said = capfd.readouterr()
        return status, said.out + said.err, begun

    yield give
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows(said):
    """Return seed -> what became of it."""
    cells = [line.split("│")[1:3] for line in said.splitlines() if "seed=" in line and "│" in line]
    return {int(point.strip().removeprefix("seed=")): word.strip() for point, word in cells}


def table(said):
    """Return what stands in the table, in one line."""
    return " ".join(said.split("what became of it")[1].replace("│", " ").split())


def test_a_failed_point_does_not_stop_the_others(command, tmp_path):
    ends = {1: UserError("theta is 7"), 2: RuntimeError("out of luck\nmore")}
    status, said, begun = command(ends, "tokens=1_000", "tokens=2_000", "seed=0,1,2,3")
    assert status == 1
    assert begun == [0, 1, 2, 3]
    assert rows(said) == {0: "done", 1: "failed", 2: "failed", 3: "done"}
    assert "theta is 7" in table(said)
    assert "RuntimeError: out of luck" in table(said)
    assert (
        f"python -m groupsae.train -m output={tmp_path} model=tiny tokens=1_000 tokens=2_000"
        in said
    )
    status, said, begun = command({}, "seed=0,1,2,3")
    assert status == 0
    assert set(rows(said).values()) == {"done"}
    assert "The same command" not in said


def test_a_stopped_point_stops_the_sweep(command):
    status, said, begun = command({1: 128 + signal.SIGTERM}, "seed=0,1,2,3")
    assert status == 128 + signal.SIGTERM
    assert begun == [0, 1]
    assert rows(said) == {0: "done", 1: "stopped", 2: "not run", 3: "not run"}
    assert "go on with resume=" in table(said)
    assert command({}, "seed=0,1,2,3")[2] == [0, 1, 2, 3]  # the stop is forgotten


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_stops_the_sweep(command, number):
    status, said, begun = command({0: lambda: signal.raise_signal(number)}, "seed=0,1,2")
    assert status == 128 + number
    assert rows(said) == {0: "stopped", 1: "not run", 2: "not run"}


def test_a_point_that_submitit_told_to_stop_comes_again(command):
    """Its own handler is called when the checkpoint is written."""
    told = []
    signal.signal(signal.SIGUSR2, lambda number, _frame: told.append(number))
    command({0: 128 + signal.SIGUSR2}, "seed=0,1")
    assert told == [signal.SIGUSR2]


def test_a_point_of_several_processes_is_a_command_of_its_own(command, monkeypatch, tmp_path):
    given = []

    class Child:
        def __init__(self, line):
            given.append(line)

        def wait(self):
            return -signal.SIGTERM if "seed=1" in given[-1] else 0

        def poll(self):
            return 0

    monkeypatch.setattr(sweep_child.subprocess, "Popen", Child)
    (tmp_path / "my-conf").mkdir()
    more = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    hydras = (
        f"--config-dir={tmp_path / 'my-conf'}",
        "hydra.verbose=false",
        f"hydra.sweep.dir={tmp_path / 'x'}",
    )
    status, said, begun = command({}, "seed=0,1", *more, *reversed(hydras))
    assert (begun, len(given)) == ([], 2), said
    assert [line[1:3] for line in given] == [["-m", "groupsae.train"]] * 2
    assert [line for line in given if "-m" in line[3:]] == []
    assert [[part for part in line if part.startswith(("-", "hydra"))][1:] for line in given] == [
        list(hydras[:2])
    ] * 2
    assert ["seed=0" in given[0], "seed=1" in given[1], "trainer=ddp" in given[0]] == [True] * 3
    assert rows(said) == {0: "done", 1: "stopped"}
    assert status == 128 + signal.SIGTERM


WAITS = """
import signal, sys, time
def told(number, frame):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("ended in order")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_reaches_the_command_of_a_point_and_waits_for_it(monkeypatch, tmp_path, number):
    """A real process; submitit's signal stops it as well, and is answered with its own."""
    note, popen = tmp_path / "note", subprocess.Popen
    line = [sys.executable, "-c", WAITS, str(note)]
    monkeypatch.setattr(sweep_child.subprocess, "Popen", lambda _: popen(line))
    monkeypatch.setattr(sweep_child, "_of_the_command", list)

    def tell():
        while not Path(f"{note}.ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    teller = threading.Thread(target=tell)
    teller.start()
    assert sweep_child.run_alone([]) == 128 + number
    teller.join()
    assert note.read_text() == "ended in order"
    assert signal.getsignal(number) == before


def test_the_command_of_a_point_does_not_outlive_an_error(monkeypatch, tmp_path):
    note, popen = tmp_path / "note", subprocess.Popen

    class Child(popen):
        def wait(self, timeout=None):
            while not Path(f"{note}.ready").exists():
                time.sleep(0.02)
            monkeypatch.setattr(Child, "wait", popen.wait)
            raise RuntimeError("something else")

    line = [sys.executable, "-c", WAITS, str(note)]
    monkeypatch.setattr(sweep_child.subprocess, "Popen", lambda _: Child(line))
    monkeypatch.setattr(sweep_child, "_of_the_command", list)
    with pytest.raises(RuntimeError, match="something else"):
        sweep_child.run_alone([])
    assert note.read_text() == "ended in order"


def test_ctrl_c_leaves_jobs_elsewhere_alone(tmp_path, capfd):
    points = sweep.SweepRecorder()
    points.folder, points.elsewhere = tmp_path, True
    points.points = [["seed=0"], ["seed=1"]]
    (tmp_path / "point-0.json").write_text(
        json.dumps({"status": 0, "said": "", "folder": "f", "point": ["seed=0"]})
    )
    with pytest.raises(KeyboardInterrupt):
        points._interrupted(signal.SIGINT, None)
    assert not points.stopped  # jobs that have not begun yet look at this
    status, shown = points.table()
    assert status == 1
    sweep.Console().print(shown)
    said = capfd.readouterr().out
    assert rows(said) == {0: "done", 1: "not known"}
    assert "still running" in table(said)


def test_the_signal_that_ends_a_sweep_of_jobs_elsewhere_is_its_status(command, monkeypatch):
    def waiting():
        sweep._current.elsewhere = True
        signal.raise_signal(signal.SIGTERM)

    # the launcher waits for jobs
    monkeypatch.setattr("groupsae.train.run_point", lambda *_: waiting())
    status, _, _ = command({}, "seed=0,1")
    assert status == 128 + signal.SIGTERM


def test_a_secret_in_a_sweep_is_refused_before_anything_is_written(command, tmp_path):
    status, said, begun = command({}, "+data.token=abc", "seed=0,1")
    assert (status, begun) == (2, [])
    assert "HF_TOKEN" in said
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_cannot_work_is_refused(monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    for launcher, extra in (("parallel", "joblib"), ("slurm", "submitit")):
        with pytest.raises(UserError, match=rf"pip install 'groupsae\[{extra}\]'"):
            sweep.check_launcher(["-m", f"hydra/launcher={launcher}"])
    monkeypatch.setattr(sweep, "find_spec", lambda name: name)
    monkeypatch.setattr(sweep.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="there is no sbatch"):
        sweep.check_launcher(["-m", "hydra/launcher=slurm"])
    with pytest.raises(UserError, match="add -m"):
        sweep.check_launcher(["hydra/launcher=parallel"])
    sweep.check_launcher(["-m", "hydra/launcher=parallel"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    sweep.check_launcher(["seed=1"])
    with pytest.raises(UserError, match="under torchrun"):
        sweep.check_launcher(["-m", "seed=1,2"])


# ---- runs side by side -------------------------------------------------------------------------


def test_who_waited_finds_what_the_other_made(tmp_path, capfd):
    lock, made = tmp_path / "deep" / "lock", tmp_path / "made"
    code = (
        "import sys, time, pathlib; from groupsae.files.locks import one_at_a_time\n"
        "with one_at_a_time(pathlib.Path(sys.argv[1]), 'at it'):\n"
        "    print('has it', flush=True); time.sleep(0.5); pathlib.Path(sys.argv[2]).touch()"
    )
    waited = []
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock), str(made)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        with one_at_a_time(lock, "at it", lambda: waited.append(time.monotonic())):
            assert made.exists()
    assert waited
    assert capfd.readouterr().err == f"another process is at it: waiting for {lock}\n"
    assert not lock.exists()


def test_layers_are_not_measured_again_when_another_run_just_did(
    tiny_lm, tiny_text, tmp_path, monkeypatch
):
    import groupsae.training.measure as measure

    first = runs.overrides(tiny_lm, tiny_text, tmp_path, "tokens=512", "groups=count")
    status, folder = runs.run([*first, "groups.num_groups=1"])
    assert status == 0
    (stored,) = (tmp_path / "cache" / "angles").glob("*.npz")
    content = stored.read_bytes()
    stored.unlink()

    class OtherRun:
        def __init__(self, path, *_):
            assert path == stored.with_suffix(".lock")

        def __enter__(self):
            stored.write_bytes(content)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(measure, "one_at_a_time", OtherRun)
    monkeypatch.setattr(measure, "_measured", lambda *_: pytest.fail("measured again"))
    assert runs.run([*first, "groups.num_groups=2"])[0] == 0


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
        table = done.stdout.split("what became of it")[-1]
        assert done.returncode == 1, done.stderr
        assert table.count("│ done ") == 2
        assert table.count("│ failed ") == 1
        assert "num_groups is 9" in " ".join(table.split()).replace("│", "")
        finished = list(tmp_path.rglob("summary.json"))
        assert len(finished) == 2
    assert len(list((tmp_path / "cache" / "angles").glob("*.npz"))) == 1
    assert len({os.stat(Path(file)).st_mtime for file in finished}) == 2
