"""One group of layers and its SAE, and the training step that one or many of them share."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groupsae.data.batch import ActivationBatch
from groupsae.data.draws import stream_key
from groupsae.errors import UserError
from groupsae.sae.base import SAE, SparseLatents
from groupsae.sae.metrics import Reconstruction
from groupsae.training.optim import Adam


class SAEFactory(Protocol):
    """Makes an SAE for a residual stream of width `d_model`."""

    def __call__(self, *, d_model: int, generator: torch.Generator, **changed: Any) -> SAE:
        """Return a fresh SAE; `changed` takes the place of configured arguments."""
        ...


class SAETraining(L.LightningModule):
    """The step over all `members`: one forward, summed losses, one Adam, clipping per member.

    Summing (not averaging) and clipping each member alone keep the members independent: trained
    together they get bit for bit what each gets alone.
    """

    optim: Adam
    dead_after: int

    def members(self) -> list["GroupSAE"]:
        """Return the groups in training, in the order of the batch's slots."""
        raise NotImplementedError

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> Tensor:
        """Return the summed loss of all members."""
        members = self.members()
        rows = [batch.rows(m.slot) for m in members]
        moments = [self.all_sum(m.moments(*row)) for m, row in zip(members, rows, strict=True)]
        losses = [
            m.step(*row, moment) for m, row, moment in zip(members, rows, moments, strict=True)
        ]
        fired = self.all_sum(torch.cat([m.fired for m in members]))
        widths = [m.sae.d_sae for m in members]
        for member, mine in zip(members, fired.split(widths), strict=True):
            member.count_dead(mine > 0)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.global_step + 1) % every == 0:
            self.log_training()
        # DDP averages gradients over processes; the loss's denominators are already global
        return torch.stack(losses).sum() * self.trainer.world_size

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def log_training(self) -> None:
        """Log what accumulated since the last time: nothing is read for the log in between."""
        for member in self.members():
            for name, value in member.read_running(self.all_sum).items():
                self.check_finite(member, value)  # a sum over all processes: all stop together
                self.log(f"train/{name}/{member.name}", value, rank_zero_only=True)
        shown = set(self.serving().values())
        mean = sum(m.last_fvu for m in shown) / len(shown)
        self.log("fvu", mean, prog_bar=True, logger=False)

    def check_finite(self, member: "GroupSAE", value: float) -> None:
        """Raise UserError if a value of the member has become NaN or infinite."""
        if not math.isfinite(value):
            raise UserError(
                f"{member.name}: the loss is not a finite number at step {self.global_step}. "
                "Earlier checkpoints are whole. Lower optim.base_lr, or look for non-finite "
                "activations in the language model (try model.dtype=float32)."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are already spoilt."""
        for member in self.members():
            weights = sum(float(p.detach().abs().sum()) for p in member.sae.parameters())
            self.check_finite(member, weights + float(member.running.sum()))

    # ---- optimiser ----------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one Adam with a named parameter group for each member."""
        return self.optim.build(
            [
                {
                    "params": list(m.sae.parameters()),
                    "name": m.name,
                    "lr": self.optim.lr(m.sae.d_sae),
                }
                for m in self.members()
            ]
        )

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Project the decoders' gradients, then clip each member on its own (in that order)."""
        for member in self.members():
            member.sae.project_gradient()
            nn.utils.clip_grad_norm_(member.sae.parameters(), self.optim.clip_norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then normalise: here, so that every checkpoint holds unit decoders."""
        super().optimizer_step(*args, **kwargs)
        for member in self.members():
            member.sae.normalize_decoder()

    # ---- validation ---------------------------------------------------------------------

    def serving(self) -> dict[int, "GroupSAE"]:
        """Return layer -> the member that stands for it in the figures per layer."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Start empty metrics, one for each member and layer."""
        self.val_metrics = {
            (m.name, layer): Reconstruction(d_model=m.sae.d_model, d_sae=m.sae.d_sae).to(
                self.device
            )
            for m in self.members()
            for layer in m.layers
        }

    def validation_step(self, batch: Iterable[ActivationBatch], batch_idx: int) -> None:
        """Reconstruct every layer with each of its SAEs."""
        slots = {layer: i for i, layer in enumerate(sorted(self.serving()))}
        for part in batch:
            for member in self.members():
                for layer in member.layers:
                    x, _ = part.rows(slots[layer])
                    x_hat, latents = member.reconstruct(x, layer)
                    self.val_metrics[member.name, layer].update(x, x_hat, latents)

    def on_validation_epoch_end(self) -> None:
        """Log fvu and l0 per layer; per SAE their means and the latents that never fired."""
        self.val_results = {key: metric.compute() for key, metric in self.val_metrics.items()}
        for member in self.members():
            mine = [self.val_results[member.name, layer] for layer in member.layers]
            fired = torch.stack([r["fired"] for r in mine]).any(0)
            fvu = torch.stack([r["fvu"] for r in mine]).mean()
            l0 = torch.stack([r["l0"] for r in mine]).mean()
            unfired = 1 - fired.float().mean()
            self.log(f"val/fvu/{member.name}", fvu.float(), rank_zero_only=True)
            self.log(f"val/l0/{member.name}", l0.float(), rank_zero_only=True)
            self.log(f"val/unfired/{member.name}", unfired, rank_zero_only=True)
        served = {
            layer: self.val_results[m.name, layer] for layer, m in sorted(self.serving().items())
        }
        for layer, result in served.items():
            self.log(f"val/fvu/layer.{layer}", result["fvu"].float(), rank_zero_only=True)
            self.log(f"val/l0/layer.{layer}", result["l0"].float(), rank_zero_only=True)
        everywhere = torch.stack([r["fvu"] for r in served.values()]).mean()
        self.log("val/fvu/mean", everywhere.float(), prog_bar=True, rank_zero_only=True)


class GroupSAE(SAETraining):
    """One group of layers, its SAE and its norm factors; can be fitted alone.

    Args:
        name: such as `layers.3-5`.
        layers: the group, sorted.
        norm_factors: 1 / sqrt(mean |x|^2) of each of the layers; activations are multiplied by
            it on the way in and divided on the way out.
        sae: factory of the SAE.
        d_model: width of the residual stream.
        optim: the optimiser's recipe.
        dead_after: tokens without firing after which a latent counts as dead.
        seed: of the initial weights, together with the layers.
        slot: which rows of a batch are this group's.
    """

    norm_factors: Tensor
    tokens_since_fired: Tensor
    tokens_per_layer: Tensor
    running: Tensor

    def __init__(
        self,
        *,
        name: str,
        layers: list[int],
        norm_factors: Mapping[int, float],
        sae: SAEFactory,
        d_model: int,
        optim: Adam,
        dead_after: int,
        seed: int,
        slot: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.layers, self.optim, self.dead_after = name, layers, optim, dead_after
        self.slot = slot
        generator = torch.Generator().manual_seed(stream_key(seed, layers) % 2**63)
        self.sae = sae(d_model=d_model, generator=generator)
        factors = torch.full((max(layers) + 1,), torch.nan)  # NaN: a foreign layer must not pass
        factors[layers] = torch.tensor([norm_factors[layer] for layer in layers])
        self.register_buffer("norm_factors", factors)
        self.register_buffer("tokens_since_fired", torch.zeros(self.sae.d_sae, dtype=torch.int64))
        self.register_buffer("tokens_per_layer", torch.zeros(len(factors), dtype=torch.int64))
        running = torch.zeros(3, dtype=torch.float64)  # sums of fvu, auxk, l0 since last logged
        self.register_buffer("running", running, persistent=False)
        self.running_steps = 0
        self.fired: Tensor = torch.empty(0)
        self.last_fvu = float("nan")

    def members(self) -> list["GroupSAE"]:
        """Return itself."""
        return [self]

    def serving(self) -> dict[int, "GroupSAE"]:
        """Return itself for each of its layers."""
        return dict.fromkeys(self.layers, self)

    def scale(self, layers: Int[Tensor, "batch"]) -> Float[Tensor, "batch 1"]:
        """Return each row's norm factor."""
        return self.norm_factors[layers].unsqueeze(1)

    def moments(
        self, acts: Float[Tensor, "batch d_model"], layers: Int[Tensor, "batch"]
    ) -> Float[Tensor, "d_model+1+layer"]:
        """Return sum of x, sum of |x|^2 and rows per layer of scaled rows, in float64."""
        x = (acts * self.scale(layers)).double()
        counts = torch.bincount(layers, minlength=len(self.norm_factors)).double()
        return torch.cat([x.sum(0), x.square().sum().reshape(1), counts])

    def step(
        self,
        acts: Float[Tensor, "batch d_model"],
        layers: Int[Tensor, "batch"],
        moments: Float[Tensor, "d_model+1+layer"],
    ) -> Float[Tensor, ""]:
        """Return this process's part of the loss; remembers what fired.

        Args:
            acts: raw activations.
            layers: the layer of each row.
            moments: of the batch over all processes, as `moments` gives them.
        """
        sum_x, sum_squares, counts = moments.split([self.sae.d_model, 1, len(self.norm_factors)])
        # at least 1 row and a positive variance: a batch of excluded tokens only has loss zero
        num_rows = counts.sum().clamp_min(1)
        variance = (sum_squares[0] - sum_x.square().sum() / num_rows).clamp_min(1e-12)
        output = self.sae.forward(acts * self.scale(layers), variance.float(), self.dead())
        with torch.no_grad():
            active = output.latents.acts > 0
            self.fired = torch.zeros_like(self.tokens_since_fired)
            self.fired[output.latents.indices[active]] = 1
            self.tokens_per_layer += counts.long()
            self.tokens_since_fired += counts.sum().long()
            auxk = output.losses.get("auxk", torch.zeros_like(output.losses["fvu"]))
            self.running += torch.stack(
                [output.losses["fvu"], auxk, active.sum() / num_rows]
            ).double()
            self.running_steps += 1
        return torch.stack(list(output.losses.values())).sum()

    def dead(self) -> Tensor:
        """Return the mask of latents that have not fired for `dead_after` tokens."""
        return self.tokens_since_fired >= self.dead_after

    def count_dead(self, fired: Bool[Tensor, "d_sae"]) -> None:
        """Reset the counters of what fired anywhere in the global batch."""
        self.tokens_since_fired[fired] = 0

    def read_running(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means since the last call (each process holds its part), and start anew.

        fvu here is that of the mixed batch: its variance includes the differences between the
        layers' means, so compare groups by `val/fvu`, which is per layer.
        """
        fvu, auxk, l0 = (all_sum(self.running.clone()) / self.running_steps).tolist()
        self.running.zero_()
        self.running_steps, self.last_fvu = 0, fvu
        return {"fvu": fvu, "auxk": auxk, "l0": l0, "dead": float(self.dead().double().mean())}

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "batch d_model"], layer: int
    ) -> tuple[Float[Tensor, "batch d_model"], SparseLatents]:
        """Return the reconstruction of one layer's raw activations, and the latents."""
        factor = self.norm_factors[layer]
        latents = self.sae.encode(x * factor)
        return self.sae.decode(latents) / factor, latents
