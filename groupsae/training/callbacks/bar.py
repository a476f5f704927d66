"""The progress bar's figures, without asking the device for them at every step."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.progress_bar import get_standard_metrics

from groupsae.progress import Lines


class Bar(RichProgressBar):
    """Lightning's bar, which shows what the module keeps in `shown`.

    Values that are logged with `prog_bar=True` become tensors on the device, and Lightning reads
    each of them back twice in every step; the host waits for the device each time.
    """

    lines: Lines | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            tokens = self._tokens(trainer)
            steps = int(trainer.num_training_batches)
            self.lines = Lines("training", tokens * steps, tokens * trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Move the bar; where none is seen, write a line now and then."""
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self.lines is not None:
            self.lines.tell(self._tokens(trainer) * trainer.global_step)

    def _tokens(self, trainer: L.Trainer) -> int:
        """Return the tokens of a step."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return int(data.tokens_per_step)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the run's version and what the module shows."""
        shown: Any = pl_module.shown
        return {**get_standard_metrics(trainer), **shown}
