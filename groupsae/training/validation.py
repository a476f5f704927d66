"""Members in one process or spread over several, and their validation on held-out text."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
import torch

from groupsae.data.batch import ActivationBatch
from groupsae.sae.metrics import Reconstruction
from groupsae.training.parallel.collect import gather_named

if TYPE_CHECKING:
    from groupsae.training.group import GroupSAE

T = TypeVar("T")


class Validated(L.LightningModule):
    """SAEs, some or all of them in this process, each tested on every layer that it serves."""

    spread: bool = False  # over the processes: each SAE is trained by one of them

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, float] = {}  # figures for the progress bar

    def members(self) -> list["GroupSAE"]:
        """Return the groups that this process trains, in the order of the plan."""
        raise NotImplementedError

    def all_names(self) -> list[str]:
        """Return the names of the groups that any process trains, in the order of the plan."""
        return [member.name for member in self.members()]

    def shared_by(self) -> int:
        """Return the number of processes that train each SAE together."""
        return 1 if self.spread else self.trainer.world_size

    def of_all(self, mine: dict[str, T]) -> dict[str, T]:
        """Return what every process has to say of its members, in the order of the plan.

        Args:
            mine: name of a member -> plain values.
        """
        if not self.spread:
            return mine
        found = gather_named(mine)
        return {name: found[name] for name in self.all_names()}

    def serving(self) -> dict[int, str]:
        """Return layer -> name of the SAE that stands for it in the figures per layer."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Start empty metrics, one for each member and layer."""
        self.val_metrics = {
            (m.name, layer): Reconstruction(
                d_model=m.sae.d_model, d_sae=m.sae.d_sae, sync_on_compute=not self.spread
            ).to(self.device)
            for m in self.members()
            for layer in m.layers
        }

    def validation_step(self, batch: Iterable[ActivationBatch], batch_idx: int) -> None:
        """Reconstruct every layer with each of its SAEs."""
        layers = sorted({layer for member in self.members() for layer in member.layers})
        slots = {layer: i for i, layer in enumerate(layers)}
        for part in batch:
            for member in self.members():
                for layer in member.layers:
                    x, _ = part.rows(slots[layer])
                    x_hat, latents = member.reconstruct(x, layer)
                    self.val_metrics[member.name, layer].update(x, x_hat, latents)

    def on_validation_epoch_end(self) -> None:
        """Log fvu and l0 per layer; per SAE their means and the latents that never fired."""
        self.val_results = self.of_all({m.name: self._validated(m) for m in self.members()})
        for name, result in self.val_results.items():
            for figure in ("fvu", "l0", "unfired"):
                self.log(f"val/{figure}/{name}", result[figure], rank_zero_only=True)
        served = {
            layer: self.val_results[name]["per_layer"][layer]
            for layer, name in sorted(self.serving().items())
        }
        for layer, found in served.items():
            self.log(f"val/fvu/layer.{layer}", found["fvu"], rank_zero_only=True)
            self.log(f"val/l0/layer.{layer}", found["l0"], rank_zero_only=True)
        everywhere = mean_of(found["fvu"] for found in served.values())
        self.log("val/fvu/mean", everywhere, rank_zero_only=True)
        self.shown["val/fvu/mean"] = everywhere

    def _validated(self, member: "GroupSAE") -> dict[str, Any]:
        """Return a member's figures as plain values: of each layer, and of all of them."""
        mine = {layer: self.val_metrics[member.name, layer].compute() for layer in member.layers}
        fired = torch.stack([result["fired"] for result in mine.values()]).any(0)
        per_layer = {x: {key: float(r[key]) for key in ("fvu", "l0")} for x, r in mine.items()}
        return {
            **{key: mean_of(r[key] for r in per_layer.values()) for key in ("fvu", "l0")},
            "unfired": 1 - float(fired.double().mean()),
            "dead": float(member.dead().double().mean()),
            "skipped": int(member.skipped[0]),
            "tokens_per_layer": {x: int(member.tokens_per_layer[x]) for x in member.layers},
            "per_layer": per_layer,
        }


def mean_of(values: Iterable[float]) -> float:
    """Return the mean."""
    listed = list(values)
    return sum(listed) / len(listed)
