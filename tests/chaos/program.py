"""Runs of the training command as a user starts them, with or without a fault."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runs import overrides, saved

FAULTY = Path(__file__).with_name("faulty.py")
TOKENS_PER_STEP, STEPS = 8 * 64, 12
MORE = [
    f"tokens={TOKENS_PER_STEP * STEPS}",
    "eval_every=5",
    "evaluate=true",
    "evaluation.tokens=512",
    "evaluation.together=false",
    "evaluation.similarity_tokens=64",
]
SEVERAL = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy.timeout_minutes=3"]


@dataclass
class Done:
    """What came of a command."""

    status: int
    output: str
    seconds: float


class Warm:
    """The process that commands of one process are forked from."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.warm"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            text=True,
        )

    def start(self, place: Path, arguments: list[str], fault: dict) -> None:
        """Start a command."""
        assert self.process.stdin is not None
        order = {"place": str(place), "arguments": arguments, "fault": fault}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End it; nothing of it is left."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


class Running:
    """A command that was started; `place` with several suffixes is where it says something."""

    def __init__(self, place: Path, process: subprocess.Popen | None) -> None:
        self.place, self.process, self.began = place, process, time.monotonic()

    @property
    def pid(self) -> int:
        """Return the number of its (first) process, which is that of its session."""
        if self.process is not None:
            return self.process.pid
        return int(self.place.with_suffix(".pid").read_text())

    def poll(self) -> int | None:
        """Return what it ended with; None while it runs."""
        if self.process is not None:
            return self.process.poll()
        status = self.place.with_suffix(".status")
        return int(status.read_text()) if status.exists() else None

    def end(self, timeout: float = 300) -> Done:
        """Wait until it has ended; fail if it hangs or leaves a process behind."""
        while (status := self.poll()) is None:
            if time.monotonic() - self.began > timeout:
                os.killpg(self.pid, 9)
                raise AssertionError(f"it hangs after {timeout} s:\n{self.output()}")
            time.sleep(0.05)
        seconds = time.monotonic() - self.began
        wait_for_the_rest(self.pid)
        return Done(status, self.output(), seconds)

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.place.with_suffix(".out").read_text()


class Program:
    """One command with an output folder of its own.

    Args:
        warm: forks it, if it is of one process.
        lm: folder of the language model.
        text: folder of the text.
        place: an empty folder.
        more: arguments.
    """

    def __init__(self, warm: Warm, lm: Path, text: Path, place: Path, *more: str) -> None:
        self.warm, self.place, self.output = warm, place, place / "output"
        self.arguments = overrides(lm, text, self.output, *MORE, *more)
        self.several = any(each in more for each in SEVERAL)
        self.command = [sys.executable, str(FAULTY), *self.arguments]
        self.times = 0

    def start(self, **fault) -> Running:
        """Start the command with a fault in it."""
        self.times += 1
        place = self.place / f"{self.times}.out"
        if not self.several:
            self.warm.start(place.with_suffix(""), self.arguments, fault)
            return Running(place, None)
        with place.open("w") as out:
            process = subprocess.Popen(
                self.command,
                env={**os.environ, "CHAOS": json.dumps(fault), "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it can be seen that nothing of it is left over
            )
        return Running(place, process)

    def run(self, **fault) -> Done:
        """Run the command to its end."""
        return self.start(**fault).end()

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        (config,) = self.output.glob("*/*/*/.hydra/config.yaml")
        return config.parents[1]

    def last_step(self) -> int:
        """Return the step of the newest checkpoint that is there; 0 if there is none."""
        steps = [
            int(p.parent.stem.split("=")[1])
            for p in self.output.glob("*/*/*/checkpoints/step=*.ckpt/manifest.json")
        ]
        return max(steps, default=0)

    def results(self) -> dict:
        """Return every bit that the run is judged by: weights, and what evaluating them gave."""
        evaluation = json.loads((self.folder / "evaluation" / "evaluation.json").read_text())
        weights = {name: t.numpy().tobytes() for name, t in saved(self.folder).items()}
        assert weights
        return {**weights, "results": evaluation["results"]}


def wait_for_the_rest(group: int, seconds: float = 20) -> None:
    """Fail if processes of a command are still there after so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, 9)
    raise AssertionError("processes were left over")


def resumed_from(done: Done) -> int:
    """Return the step that a command resumed from; 0 if it started from the beginning."""
    lines = "".join(done.output.split("\n"))
    if "resuming from" not in lines:
        return 0
    return int(lines.split("resuming from")[1].split("step=")[1].split(".")[0])
