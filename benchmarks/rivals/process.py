"""The driver's side of the line to one worker."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.rivals.contenders import ENVIRONMENTS, HERE, OURS, TUNED, Contender


class Worker:
    """A contender's process: started at once, ready when `facts` returns.

    Args:
        contender: that it runs.
        tuned: whether its allocator is told to keep what is freed.
        log: file for whatever it prints.
    """

    def __init__(self, contender: Contender, *, tuned: bool, log: Path) -> None:
        self.contender, self.log = contender, log
        if not Path(contender.command()[0]).exists():
            raise SystemExit(
                f"error: {contender.library} has no environment under {ENVIRONMENTS}: "
                "`make bench-rivals` makes it."
            )
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= TUNED if tuned else {}
        if contender.library == OURS:
            environment["PYTHONPATH"] = str(HERE.parent.parent)
        log.parent.mkdir(parents=True, exist_ok=True)
        read, write = os.pipe()
        self.answers = os.fdopen(read)
        with log.open("w") as printed:
            self.process = subprocess.Popen(
                contender.command(),
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=(write,),
                env=environment | {"ANSWERS": str(write)},
                text=True,
            )
        os.close(write)

    def facts(self) -> dict[str, Any]:
        """Return what the worker says of itself, once it is ready to train."""
        return self._answer()

    def block(self, steps: int) -> list[float]:
        """Return the seconds of each step of a block; the next steps of one long training."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def stop(self) -> None:
        """End the process: it goes when nothing more can be asked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # still importing, or in a step
            self.process.kill()
            self.process.wait()
        self.answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            end = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(f"error: {self.contender.name} has ended ({self.log}):\n{end}")
        return json.loads(line)
