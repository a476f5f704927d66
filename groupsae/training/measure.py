"""Layer distances and norms over the calibration split, measured once and cached."""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.files.atomic import atomic_write
from groupsae.files.locks import one_at_a_time
from groupsae.files.reading import damaged, read_npz
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.moments import LayerMoments
from groupsae.grouping.shares import Shares
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.training.losses import Losses, measure_losses

FORMAT = 6  # of the cached file
# Tokens that the distances of the other centring are measured on. Angles of one pair of layers
# differ between tokens by about 0.05, so those means are known to 0.001.
SAMPLE = 4096

# rule for norm factors -> factors of all layers
SCALES: dict[str, Callable[["Measurement"], np.ndarray]] = {
    "rms": lambda m: 1 / m.rms_norms,
    "mean_norm": lambda m: 1 / m.mean_norms,
    "sqrt_d": lambda m: m.d_model**0.5 / m.mean_norms,
    "none": lambda m: np.ones_like(m.rms_norms),
}


@dataclass(frozen=True)
class Measurement:
    """Result of the calibration.

    Attributes:
        distances: mean angular distance of every pair of layers, fractions of pi, [L, L].
        rms_norms: sqrt(mean |x|^2) of every layer, [L].
        mean_norms: mean |x| of every layer, [L].
        d_model: width of the activations.
        provenance: model, text, tokens and options behind them.
        seconds: duration of the measurement, when it was made.
        shares: what each layer's squared norm consists of.
        cosines: mean cosine of every pair of layers, [L, L].
        means: mean activation of every layer, [L, d_model].
        other_distances: as `distances` with the other centring, from `SAMPLE` tokens that are
            evenly spread over the text; None if the filters left out all of these tokens.
        other_cosines: as `cosines`, of the tokens and with the centring of `other_distances`.
        losses: of the unchanged model on a little of the text, see `Losses`; None if it predicts
            no next token.
    """

    distances: np.ndarray
    rms_norms: np.ndarray
    mean_norms: np.ndarray
    d_model: int
    provenance: dict[str, Any]
    seconds: float
    shares: Shares
    cosines: np.ndarray
    means: np.ndarray
    other_distances: np.ndarray | None = None
    other_cosines: np.ndarray | None = None
    losses: Losses | None = None

    @property
    def other_centring(self) -> str:
        """Return the centring of `other_distances`."""
        return "none" if self.provenance["centring"] == "mean" else "mean"

    @property
    def tokens(self) -> int:
        """Return the number of tokens that were measured."""
        return int(self.provenance["tokens"])

    @property
    def passes(self) -> int:
        """Return how often the model read them; centring needs a second pass."""
        return 2 if self.provenance["centring"] == "mean" else 1

    def norm_factors(self, scale: str) -> dict[int, float]:
        """Return layer -> factor of its activations.

        Args:
            scale: `rms` makes the mean squared norm 1 (paper, appendix A), `mean_norm` the mean
                norm 1 (the reference code), `sqrt_d` the mean norm sqrt(d_model); `none` leaves
                them as they are.
        """
        return {layer: float(factor) for layer, factor in enumerate(SCALES[scale](self))}

    def layer_means(self) -> dict[int, Tensor]:
        """Return layer -> mean of its raw activations."""
        return dict(enumerate(torch.from_numpy(self.means)))

    def save(self, path: Path) -> None:
        """Write everything into one npz, atomically."""
        values = {name: x for name, x in vars(self).items() if x is not None}
        for grouped in ("shares", "losses"):
            values |= values.pop(grouped)._asdict() if grouped in values else {}
        values["provenance"] = np.array(json.dumps(self.provenance))
        with atomic_write(path, shared=True) as handle:
            np.savez(handle, **values)

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Read the files of `save`.

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
                Shares(*(stored[name] for name in Shares._fields)),
                stored["cosines"],
                stored["means"],
                stored.get("other_distances"),
                stored.get("other_cosines"),
                Losses.read(stored),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path) from error


def provenance_of(data: ActivationDataModule, tokens: int, centring: str) -> dict[str, Any]:
    """Return all that a measurement depends on: model and weights, text, tokens, options."""
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
    """Return an earlier measurement; None if none exists or its file is damaged."""
    if not path.exists():
        return None
    try:
        return Measurement.load(path)
    except UserError:
        warnings.warn(f"{path} is damaged: the layers are measured again", stacklevel=2)
        return None


def measure(
    data: ActivationDataModule,
    trainer: L.Trainer,
    tokens: int,
    centring: str,
    cache: Path,
) -> Measurement:
    """Return distances and norms, from the cache if this content was measured before.

    The key is (model, weights, text, tokens, options), so a sweep over the number of groups
    measures once: of several runs at a time one measures, and the others wait for it. With
    several processes each takes its share and all get the same sums.
    """
    provenance = provenance_of(data, tokens, centring)
    content = json.dumps({**provenance, "format": FORMAT}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = cache / "angles" / f"{key}.npz"
    with _one_run_at_a_time(path, trainer):
        # all processes use the measurement that the first one read
        found = cached(path) if trainer.is_global_zero else None
        found = trainer.strategy.broadcast(found)
        if found is None:
            found = _measure(data, trainer, tokens, provenance)
            if trainer.is_global_zero:
                found.save(path)
    return found


@contextmanager
def _one_run_at_a_time(path: Path, trainer: L.Trainer) -> Iterator[None]:
    """Hold the lock of a measurement, in the first process of a run for all of them.

    While it waits for another run, it sends the others a sign each second: without one they would
    give it up after the timeout of a collective.
    """
    still_waiting = trainer.strategy.broadcast
    if not trainer.is_global_zero:
        while still_waiting(None):
            pass
        yield
        return
    lock = path.with_suffix(".lock")
    with one_at_a_time(lock, "measuring these layers", lambda: still_waiting(True)):
        still_waiting(False)
        yield


def _measure(
    data: ActivationDataModule, trainer: L.Trainer, tokens: int, provenance: dict[str, Any]
) -> Measurement:
    """Run the calibration tokens through the model, once or (centred) twice.

    The distances of the other centring come from a sample of the first pass, which waits for the
    mean of all tokens.
    """
    centring, device = provenance["centring"], trainer.strategy.root_device
    data.reader.fill_calibration(tokens)
    num_layers, d_model = data.lm.geometry.num_layers, data.lm.geometry.d_model
    moments = LayerMoments(num_layers=num_layers, d_model=d_model).to(device)
    angles, others = (
        AngularDistance(num_layers=num_layers, centring=each).to(device)
        for each in (centring, "none" if centring == "mean" else "mean")
    )
    passes: list[list[Any]] = [[moments], [angles]] if centring == "mean" else [[moments, angles]]
    total, watch = provenance["tokens"] * len(passes), Stopwatch()
    sample, seen = list[Tensor](), 0
    with watch, token_progress("measuring layers", total, trainer.is_global_zero) as advance:
        for number, metrics in enumerate(passes):
            if number == 1:
                angles.set_mean(moments.moments().mean)
            for batch in data.calibration_batches(tokens):
                counted = batch.everywhere()
                for metric in metrics:
                    metric.update(batch.acts, counted)
                if number == 0:
                    chosen = _sampled(data, provenance["tokens"], seen, batch.acts.shape[1])
                    chosen = chosen.to(device) if counted is None else chosen.to(device) & counted
                    sample.append(batch.acts[:, chosen].cpu())
                    seen += batch.acts.shape[1]
                advance(batch.acts.shape[1] * trainer.world_size)
        found = moments.moments()
        if centring == "none":
            others.set_mean(found.mean)
        for acts in sample:
            others.update(acts.to(device))
        other_distances = other_cosines = None
        with suppress(UserError):  # the filters left out all of these few tokens
            other_distances = others.distances().cpu().numpy()
            other_cosines = others.cosines().cpu().numpy()
    return Measurement(
        angles.distances().cpu().numpy(),
        found.rms_norm.cpu().numpy(),
        found.mean_norm.cpu().numpy(),
        d_model,
        provenance,
        watch.seconds,
        found.shares(),
        angles.cosines().cpu().numpy(),
        found.mean.cpu().numpy(),
        other_distances,
        other_cosines,
        measure_losses(data, device) if trainer.is_global_zero else None,
    )


def _sampled(
    data: ActivationDataModule, tokens: int, first: int, count: int
) -> Bool[Tensor, " token"]:
    """Return which of this process's tokens first ... first + count - 1 are in the sample.

    It is every n-th token of the text, whatever the number of processes. n has no divisor in
    common with the context, so that all positions of a block occur equally often: the first ones
    are unlike the others.
    """
    share = data.tokens_per_step // data.num_processes
    own = torch.arange(first, first + count)
    places = own // share * data.tokens_per_step + data.rank * share + own % share
    step = -(-tokens // SAMPLE)
    while math.gcd(step, data.packing.context) > 1:
        step += 1
    return places % step == 0
