"""The progress bar's figures, without asking the device for them at every step."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.progress_bar import get_standard_metrics


class Bar(RichProgressBar):
    """Lightning's bar, which shows the values in the module's `shown`.

    Values that are logged with `prog_bar=True` become tensors on the device, and Lightning reads
    each of them back twice in every step; the host waits for the device each time.
    """

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """Return the run's version and the module's values."""
        return {**get_standard_metrics(trainer), **pl_module.shown}
