"""A callback of a user's own, as `+callbacks.act._target_=tests.helpers.callbacks.Act` adds it."""

import signal
from typing import Any

import lightning as L

TARGET = "tests.helpers.callbacks.Act"  # for GROUPSAE_TARGETS


class Act(L.Callback):
    """Does something when a run of one seed is built, or after its first step.

    Args:
        do: the name of a signal, or the text of an error.
        seed: of the run; None for every run.
        when: `built` or `trained`.
    """

    def __init__(self, do: str, seed: int | None = None, when: str = "trained") -> None:
        self.do, self.seed, self.when = do, seed, when
        if when == "built":
            self.act()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Act after the first step."""
        if trainer.global_step == 1 and self.seed in (None, trainer.datamodule.seed):
            self.act()

    def act(self) -> None:
        """Raise the signal or the error."""
        if self.do in signal.Signals.__members__:
            signal.raise_signal(signal.Signals[self.do])
        else:
            raise RuntimeError(self.do)


def act(**arguments: Any) -> list[str]:
    """Return the overrides that add it."""
    given = {"_target_": TARGET, **arguments}
    return [f"+callbacks.act.{name}={value}" for name, value in given.items()]
