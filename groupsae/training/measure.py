"""Layer distances and norms over the calibration split, measured once and cached."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.files.atomic import atomic_write
from groupsae.files.locks import one_at_a_time
from groupsae.files.reading import damaged, read_npz
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.moments import LayerMoments
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress

FORMAT = 4  # of the cached file


SCALES = ("rms", "mean_norm", "sqrt_d", "none")


def check_scale(scale: str) -> None:
    """Raise UserError if there is no such rule for norm factors."""
    if scale not in SCALES:
        raise UserError(f"calibration.scale is {scale!r}: use {', '.join(SCALES)}.")


@dataclass(frozen=True)
class Measurement:
    """What calibration found.

    Attributes:
        distances: mean angular distance of every pair of layers, fractions of pi, [L, L].
        rms_norms: sqrt(mean |x|^2) of every layer, [L].
        mean_norms: mean |x| of every layer, [L].
        d_model: width of the activations.
        provenance: model, text, tokens and options behind them.
        seconds: that the measurement took, when it was made.
    """

    distances: np.ndarray
    rms_norms: np.ndarray
    mean_norms: np.ndarray
    d_model: int
    provenance: dict[str, Any]
    seconds: float

    @property
    def tokens(self) -> int:
        """Return the tokens that it was made on."""
        return int(self.provenance["tokens"])

    @property
    def passes(self) -> int:
        """Return the forwards of the model over them; centring needs a second one."""
        return 2 if self.provenance["centring"] == "mean" else 1

    def norm_factors(self, scale: str) -> dict[int, float]:
        """Return what the activations of each layer are multiplied by.

        Args:
            scale: `rms` makes the mean squared norm 1 (paper, appendix A), `mean_norm` the mean
                norm 1 (the reference code), `sqrt_d` the mean norm sqrt(d_model); `none` leaves
                them as they are.
        """
        factors = {
            "rms": 1 / self.rms_norms,
            "mean_norm": 1 / self.mean_norms,
            "sqrt_d": self.d_model**0.5 / self.mean_norms,
            "none": np.ones_like(self.rms_norms),
        }
        return {layer: float(factor) for layer, factor in enumerate(factors[scale])}

    def save(self, path: Path) -> None:
        """Write everything into one npz, whole or not at all."""
        with atomic_write(path, shared=True) as handle:
            np.savez(
                handle,
                distances=self.distances,
                rms_norms=self.rms_norms,
                mean_norms=self.mean_norms,
                d_model=self.d_model,
                provenance=np.array(json.dumps(self.provenance)),
                seconds=self.seconds,
            )

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Read what `save` wrote.

        Raises:
            UserError: the file is damaged.
        """
        stored = read_npz(path)
        try:
            return cls(
                stored["distances"],
                stored["rms_norms"],
                stored["mean_norms"],
                int(stored["d_model"]),
                json.loads(str(stored["provenance"])),
                float(stored["seconds"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path) from error


def provenance_of(data: ActivationDataModule, tokens: int, centring: str) -> dict[str, Any]:
    """Return what a measurement depends on: model and weights, text, tokens, options."""
    steps = data.steps_for("calibration", tokens)
    return {
        **data.described(),
        "weights": data.lm.fingerprint(),
        "text": data.blocks.key,
        "split": "calibration",
        "tokens": steps * data.tokens_per_step,
        "centring": centring,
    }


def cached(path: Path) -> Measurement | None:
    """Return what was measured before; None if nothing was, or if the file is damaged."""
    if not path.exists():
        return None
    try:
        return Measurement.load(path)
    except UserError:
        warnings.warn(f"{path} is damaged: it is measured anew", stacklevel=2)
        return None


def measure(
    data: ActivationDataModule, trainer: L.Trainer, tokens: int, centring: str, cache: Path
) -> Measurement:
    """Return distances and norms, from the cache if this content was measured before.

    The key is (model, weights, text, tokens, options), so a sweep over the number of groups
    measures once: of runs side by side one measures, and the others wait for it. With several
    processes each takes its share and all get the same sums.
    """
    provenance = provenance_of(data, tokens, centring)
    content = json.dumps({**provenance, "format": FORMAT}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = cache / "angles" / f"{key}.npz"
    with _one_run_at_a_time(path, trainer):
        found = cached(path) if trainer.global_rank == 0 else None
        found = trainer.strategy.broadcast(found)  # what the first process read, all go on with
        if found is None:
            found = _measured(data, trainer, tokens, provenance)
            if trainer.global_rank == 0:
                found.save(path)
    return found


@contextmanager
def _one_run_at_a_time(path: Path, trainer: L.Trainer) -> Iterator[None]:
    """Hold the lock of a measurement, in the first process of a run for all of them.

    While it waits for another run the others hear of it each second: else they would take it for
    lost after the time-out of a collective.
    """
    tell = trainer.strategy.broadcast
    if trainer.global_rank:
        while tell(None):
            pass
        yield
        return
    lock = path.with_suffix(".lock")
    with one_at_a_time(lock, "measuring these layers", lambda: tell(True)):
        tell(False)
        yield


def _measured(
    data: ActivationDataModule, trainer: L.Trainer, tokens: int, provenance: dict[str, Any]
) -> Measurement:
    """Run the calibration tokens through the model, once or (centred) twice."""
    centring = provenance["centring"]
    data.fill_calibration(tokens)
    geometry, device = data.lm.geometry, trainer.strategy.root_device
    size = {"num_layers": geometry.num_layers, "d_model": geometry.d_model}
    moments = LayerMoments(**size).to(device)
    angles = AngularDistance(**size, centring=centring).to(device)
    passes = [moments, angles] if centring == "mean" else [None]
    watch = Stopwatch()
    total = provenance["tokens"] * len(passes)
    with watch, token_progress("measuring layers", total, trainer.global_rank == 0) as advance:
        for metric in passes:
            if metric is angles:
                angles.set_mean(moments.moments().mean)
            for batch in data.calibration_batches(tokens):
                for each in [moments, angles] if metric is None else [metric]:
                    each.update(batch.acts, batch.everywhere())
                advance(batch.acts.shape[1] * trainer.world_size)
    _, rms_norms, mean_norms = moments.moments()
    return Measurement(
        angles.compute().cpu().numpy(),
        rms_norms.cpu().numpy(),
        mean_norms.cpu().numpy(),
        geometry.d_model,
        provenance,
        watch.seconds,
    )
