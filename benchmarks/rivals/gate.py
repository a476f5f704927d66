"""The worker's side of the line to the driver: training waits here until a block is asked for.

Workers run in environments that lack groupsae: this module and `activations.py` need torch only.
"""

import json
import os
import sys
import time


class Gate:
    """Lets a trainer through one block of steps at a time, and times each step.

    A trainer comes by once a step, at the same point of it (as it asks for its next batch). A step
    lasts from leaving the gate to coming back; what the process waits for the driver is not in it.
    """

    def __init__(self) -> None:
        # a line of their own: libraries print to stdout (which it is where nobody drives)
        self.answers = os.fdopen(int(os.environ.get("ANSWERS", "1")), "w")
        self.left = -1  # steps of the block that are still to come; -1: not started
        self.times: list[float] = []
        self.since = 0.0

    def ready(self, **facts: object) -> None:
        """Tell the driver what this worker is."""
        self._answer(facts)

    def __call__(self) -> None:
        """Pass, or wait for the next block; ends the process when there is none."""
        now = time.perf_counter()
        if self.left >= 0:
            self.times.append(now - self.since)
            self.left -= 1
        if self.left <= 0:
            if self.times:
                self._answer({"seconds": self.times})
            order = sys.stdin.readline()
            if not order:
                sys.stdout.flush()  # what libraries printed belongs in the log
                os._exit(0)  # amid a trainer's loop: there is nothing to clean up
            self.left, self.times = json.loads(order)["steps"], []
        self.since = time.perf_counter()

    def _answer(self, facts: object) -> None:
        print(json.dumps(facts), file=self.answers, flush=True)
