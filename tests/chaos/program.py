"""Runs of the training command as a user starts them, with or without a fault."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runs import overrides, saved

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
SEVERAL = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy.timeout_minutes=0.5"]


@dataclass
class Done:
    """What came of a command."""

    status: int
    said: str
    seconds: float


class Program:
    """One command in a place of its own."""

    def __init__(self, lm: Path, text: Path, output: Path, *more: str) -> None:
        self.output = output
        arguments = overrides(lm, text, output, *MORE, *more)
        self.command = [sys.executable, str(FAULTY), *arguments]

    def start(self, **fault) -> subprocess.Popen:
        """Start the command with a fault in it."""
        return subprocess.Popen(
            self.command,
            env={**os.environ, "CHAOS": json.dumps(fault), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that the test can see that nothing of it is left over
        )

    def run(self, **fault) -> Done:
        """Run the command to its end; fail if it hangs or leaves a process behind."""
        return ended(self.start(**fault))

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


def ended(process: subprocess.Popen, timeout: float = 200) -> Done:
    """Return what came of a started command."""
    began = time.monotonic()
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        raise AssertionError(f"it hangs after {timeout} s:\n{said}") from None
    seconds = time.monotonic() - began
    wait_for_the_rest(process.pid)
    return Done(process.returncode, said, seconds)


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
    """Return the step that a command said it goes on from; 0 if it started anew."""
    lines = "".join(done.said.split("\n"))
    if "going on from" not in lines:
        return 0
    return int(lines.split("going on from")[1].split("step=")[1].split(".")[0])
