"""One group of layers with its SAE, and the training step that several groups take together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groupsae.data.batch import ActivationBatch
from groupsae.data.draws import stream_key
from groupsae.sae.base import SAE, AllSum, GlobalBatch, SparseLatents, firings, no_reduce
from groupsae.sae.metrics import Reconstruction
from groupsae.training.b_dec_init import init_b_dec
from groupsae.training.metrics import (
    is_logging_step,
    log_training,
    log_validation,
    mean_of,
    steps_of,
)
from groupsae.training.nonfinite import RunningStats, check_finite
from groupsae.training.optim import Adam
from groupsae.training.parallel.collect import num_processes
from groupsae.training.readback import Readback


@runtime_checkable
class SAEFactory(Protocol):
    """Makes an SAE for a residual stream of width `d_model`."""

    def __call__(self, *, d_model: int, generator: torch.Generator, **changed: Any) -> SAE:
        """Return a fresh SAE; `changed` takes the place of configured arguments."""
        ...


class GroupSAE(L.LightningModule):
    """One group of layers, its SAE, its norm factors and its counters; can be fitted alone.

    Fitted alone it is a `JointStep` of one group; in a suite it is one of many. Both run the same
    code, so an SAE gets the same weights either way, bit for bit.

    Args:
        name: such as `layers.3-5`.
        layers: the group, sorted.
        norm_factors: 1 / sqrt(mean |x|^2) of each layer; activations are multiplied by it before
            the SAE, and reconstructions divided by it.
        sae: factory of the SAE.
        d_model: width of the residual stream.
        optim: the optimiser's recipe.
        dead_after: rows without firing after which a latent counts as dead.
        b_dec_start: initial decoder bias, see `init_b_dec`.
        means: layer -> mean activation on the calibration text, for that.
        nonfinite: how to treat a step whose loss or gradient is not finite: `stop` ends the
            run, `skip` leaves the step out for the SAE that it concerns.
        seed: seed of the initial weights, together with the layers.
    """

    norm_factors: Tensor
    tokens_since_fired: Tensor
    tokens_per_layer: Tensor
    running: Tensor
    skipped: Tensor
    joint: "JointStep"

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
        b_dec_start: str,
        nonfinite: str,
        seed: int,
        means: Mapping[int, Float[Tensor, "d_model"]] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layers, self.optim, self.dead_after = name, layers, optim, dead_after
        self.b_dec_start, self.nonfinite = b_dec_start, nonfinite
        generator = torch.Generator().manual_seed(stream_key(seed, layers) % 2**63)
        self.sae = sae(d_model=d_model, generator=generator, layers=layers)
        self.means = {x: means[x] * norm_factors[x] for x in layers if means}
        factors = torch.full((max(layers) + 1,), torch.nan)  # NaN: a foreign layer must not pass
        factors[layers] = torch.tensor([norm_factors[layer] for layer in layers])
        self.register_buffer("norm_factors", factors)
        self.register_buffer("tokens_since_fired", torch.zeros(self.sae.d_sae, dtype=torch.int64))
        self.register_buffer("tokens_per_layer", torch.zeros(len(factors), dtype=torch.int64))
        # steps left out: how many, how many in a row, the last (the first step being 1)
        self.register_buffer("skipped", torch.zeros(3, dtype=torch.int64))
        # sums since last logged: the terms of the loss, l0, steps with a finite loss
        running = torch.zeros(len(self.sae.terms) + 2, dtype=torch.float64)
        self.register_buffer("running", running, persistent=False)
        self.running_steps = 0
        self.fired: Tensor = torch.empty(0)
        self.shown: dict[str, float] = {}  # figures for the progress bar

    # ---- one training step, in this order -------------------------------------------------

    def rows(
        self, batch: ActivationBatch
    ) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
        """Return the rows of a batch that belong to this group, scaled, and their layers."""
        acts, layers = batch.rows(self.layers)
        return self.scaled(acts, layers), layers

    def by_layer(
        self,
        x: Float[Tensor, "row d_model"],
        layers: Int[Tensor, "row"],
        sizes: Mapping[int, int] | None,
    ) -> tuple[Float[Tensor, "row d_model"], list[int]]:
        """Return rows, sorted by layer if the SAE has `maps`, and how many each layer has then.

        `sizes` is None where only the device knows: the host waits for it.
        """
        if self.sae.maps is None:
            return x, []
        if sizes is None:
            counts = torch.bincount(layers, minlength=max(self.layers) + 1).tolist()
            sizes = {layer: counts[layer] for layer in self.layers}
        return x[layers.argsort(stable=True)], [sizes[layer] for layer in self.layers]

    def scaled(
        self, acts: Float[Tensor, "row d_model"], layers: Int[Tensor, "row"]
    ) -> Float[Tensor, "row d_model"]:
        """Return rows, each multiplied by its layer's norm factor."""
        return acts * self.norm_factors[layers].unsqueeze(1)

    def moments(
        self, x: Float[Tensor, "row d_model"], layers: Int[Tensor, "row"]
    ) -> Float[Tensor, "moment"]:
        """Return sum of x, sum of |x|^2 and rows per layer, in one float64 vector."""
        wide = torch.float64
        counts = torch.zeros(len(self.norm_factors), dtype=wide, device=x.device)
        # integers, so their order does not matter; bincount would wait for the device
        counts.scatter_add_(0, layers, torch.ones_like(layers, dtype=wide))
        squares = torch.linalg.vector_norm(x, dtype=wide).square().reshape(1)
        return torch.cat([x.sum(0, dtype=wide), squares, counts])

    def step(
        self,
        x: Float[Tensor, "row d_model"],
        layers: Int[Tensor, "row"],
        moments: Float[Tensor, "moment"],
        num_dead: int = 0,
        progress: float = 1.0,
        all_sum: AllSum = no_reduce,
        sizes: Mapping[int, int] | None = None,
    ) -> Float[Tensor, ""]:
        """Return this process's part of the loss; update counters and note which latents fired.

        `moments` are those of the rows of all processes; `sizes` as in `by_layer`.
        """
        sum_x, sum_squares, counts = moments.split([self.sae.d_model, 1, len(self.norm_factors)])
        # at least 1 row and a positive variance: a batch of excluded tokens only has loss zero
        num_rows = counts.sum().clamp_min(1)
        variance = (sum_squares[0] - sum_x.square().sum() / num_rows).clamp_min(1e-12)
        dead, share = self.dead_latents(num_dead), (len(x) / num_rows).float()
        x, rows = self.by_layer(x, layers, sizes)
        batch = GlobalBatch(variance.float(), dead, progress, share, all_sum, rows)
        output = self.sae.forward(x, batch)
        loss = torch.stack(list(output.losses.values())).sum()
        with torch.no_grad():
            fired, active = firings(output.latents, self.sae.d_sae)
            self.fired = fired.long()
            self.tokens_per_layer += counts.long()
            self.tokens_since_fired += counts.sum().long()
            absent = torch.zeros_like(variance)
            terms = [output.losses.get(name, absent).double() for name in self.sae.terms]
            finite = loss.isfinite().double()
            self.running += torch.stack([*terms, active / num_rows, finite])
            self.running_steps += 1
        return loss

    def count_dead(self, fired: Bool[Tensor, "d_sae"]) -> None:
        """Reset the counters of latents that fired anywhere in the global batch."""
        self.tokens_since_fired.masked_fill_(fired, 0)

    def clip_gradient(self) -> Float[Tensor, ""]:
        """Project the decoder's gradient, then clip all gradients; return the norm before.

        In this order: a large part along the latents would shrink everything else to nothing.
        """
        self.sae.project_gradient()
        return nn.utils.clip_grad_norm_(self.sae.parameters(), self.optim.clip_norm)

    def leave_out(self, bad: Bool[Tensor, ""], before: Sequence[Tensor], step: int) -> None:
        """Restore the buffers of `before` a step where `bad` is true, and count the step.

        Weights and moments are spared by the optimiser; the host never knows.
        """
        for buffer, old in zip(self.buffers(), before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))
        times, in_a_row, last = self.skipped.unbind()
        last = torch.where(bad, torch.full_like(last, step), last)
        self.skipped.copy_(torch.stack([times + bad, (in_a_row + 1) * bad, last]))

    @torch.no_grad()
    def normalize_decoder(self, unless: Bool[Tensor, ""] | None = None) -> None:
        """Make the latents' directions unit vectors; `unless` leaves every bit unchanged."""
        if unless is None:
            self.sae.normalize_decoder()
            return
        weights = [self.sae.get_parameter(name) for name in self.sae.normalized]
        before = [weight.clone() for weight in weights]
        self.sae.normalize_decoder()
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(torch.where(unless, old, weight))

    # ---- dead latents ---------------------------------------------------------------------

    def dead(self) -> Bool[Tensor, "d_sae"]:
        """Return the mask of latents that have not fired for `dead_after` rows."""
        return self.tokens_since_fired >= self.dead_after

    def dead_latents(self, count: int) -> Int[Tensor, "dead"]:
        """Return the dead latents; `count` is their number, so that the host need not wait."""
        if count == 0:
            return torch.empty(0, dtype=torch.int64, device=self.tokens_since_fired.device)
        return self.dead().byte().argsort(descending=True, stable=True)[:count]

    # ---- figures --------------------------------------------------------------------------

    def start_running(self) -> None:
        """Set the running sums to zero."""
        self.running.zero_()
        self.running_steps = 0

    def running_stats(self, all_sum: AllSum, sharing: int) -> RunningStats:
        """Return the figures of the steps since `start_running`.

        fvu here is that of the mixed batch: its variance includes the differences between the
        layers' means, so compare groups by `val/fvu`, which is per layer. If all steps were left
        out, there are no means.
        """
        *sums, finite = all_sum(self.running.clone()).tolist()
        finite, skipped = int(finite) // sharing, self.skipped.tolist()
        skips = self.nonfinite == "skip"
        values = {"dead": float(self.dead().double().mean())}
        if skips:
            values["skipped"] = float(skipped[0])
        taken = finite if skips else self.running_steps
        if taken > 0:
            values |= {k: v / taken for k, v in zip((*self.sae.terms, "l0"), sums, strict=True)}
        # a sum with NaN or infinity in it is not finite, and needs no memory
        weights = torch.stack([p.detach().sum() for p in self.sae.parameters()])
        intact = bool(weights.isfinite().all())
        return RunningStats(values, intact, self.running_steps, finite, skipped)

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "batch d_model"], layer: int
    ) -> tuple[Float[Tensor, "batch d_model"], SparseLatents]:
        """Return the reconstruction of one layer's raw activations, and the latents."""
        factor, sae = self.norm_factors[layer], self.sae.at(layer)
        latents = sae.encode(x * factor)
        return sae.decode(latents) / factor, latents

    def start_validation(self, sync: bool = True) -> None:
        """Start empty metrics, one for each layer; `sync` sums them over the processes."""
        size = {"d_model": self.sae.d_model, "d_sae": self.sae.d_sae}
        self.val_metrics = {
            layer: Reconstruction(**size, sync_on_compute=sync).to(self.norm_factors.device)
            for layer in self.layers
        }

    def validate(self, batch: ActivationBatch) -> None:
        """Reconstruct each of this group's layers, all of which a validation batch shows."""
        for layer, metric in self.val_metrics.items():
            x, _ = batch.rows([layer])
            metric.update(x, *self.reconstruct(x, layer))

    def validated(self) -> dict[str, Any]:
        """Return the figures of a validation as plain values: per layer, and over all layers."""
        found = {layer: metric.compute() for layer, metric in self.val_metrics.items()}
        fired = torch.stack([result["fired"] for result in found.values()]).any(0)
        per_layer = {x: {key: float(r[key]) for key in ("fvu", "l0")} for x, r in found.items()}
        return {
            **{key: mean_of(r[key] for r in per_layer.values()) for key in ("fvu", "l0")},
            "unfired": 1 - float(fired.double().mean()),
            "dead": float(self.dead().double().mean()),
            "skipped": int(self.skipped[0]),
            "tokens_per_layer": {x: int(self.tokens_per_layer[x]) for x in self.layers},
            "per_layer": per_layer,
        }

    # ---- fitted alone: the suite's hooks, for one group -----------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Begin a fit: a joint step of this group only."""
        self.joint = JointStep([self], self.optim, self.nonfinite, num_processes(), self.device)
        return self.joint.optimizer

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.joint.loss(batch, self.global_step, steps_of(self))

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the running means, at every logging step."""
        if is_logging_step(self):
            log_training(self, self.joint.running_stats(restart=True), {self.name})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite."""
        check_finite(self, self.joint.running_stats())

    def on_validation_epoch_start(self) -> None:
        """Start empty metrics."""
        self.start_validation()

    def validation_step(self, batch: Iterable[ActivationBatch], batch_idx: int) -> None:
        """Reconstruct every layer."""
        for part in batch:
            self.validate(part)

    def on_validation_epoch_end(self) -> None:
        """Log fvu and l0."""
        log_validation(self, {self.name: self.validated()}, dict.fromkeys(self.layers, self.name))


class JointStep:
    """One training step of several groups: one forward, summed losses, one Adam.

    Losses are summed (not averaged) and each group is clipped alone, so no group influences
    another: an SAE trained with others is bit for bit the same as one trained alone. Nothing in a
    step waits for the device. A new one is made for each fit, so it remembers nothing of an
    earlier fit.
    `sharing` processes train each SAE together.

    Attributes:
        optimizer: one Adam with a named parameter group for each group. Its step also projects,
            clips and normalises, so every checkpoint holds unit decoders.
    """

    def __init__(
        self,
        groups: Sequence[GroupSAE],
        optim: Adam,
        nonfinite: str,
        sharing: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.groups, self.optim, self.sharing, self.device = list(groups), optim, sharing, device
        self.skips = nonfinite == "skip"
        self.warned = False  # that a step was left out
        self.position = (0, 1)  # steps taken, steps of the complete training
        self.num_dead: Readback | None = None
        self.before: list[list[Tensor]] = []  # each group's buffers before the step
        self.bad: Tensor | None = None  # groups that leave this step out; None: none may
        # Lightning counts steps of optimisers: a process without an SAE steps an unused number
        self.idle = torch.zeros(1, requires_grad=True)
        parameters = [
            {"params": list(g.sae.parameters()), "name": g.name, "lr": optim.lr(g.sae.d_sae)}
            for g in self.groups
        ] or [{"params": [self.idle], "name": "idle", "lr": 0.0}]
        self.optimizer = optim.build(parameters, self.before_update, self.after_update)
        for group in self.groups:
            group.start_running()

    def loss(self, batch: ActivationBatch, step: int, num_steps: int) -> Float[Tensor, ""]:
        """Return the summed loss of all groups, and update their counters."""
        groups, self.position = self.groups, (step, num_steps)
        if not groups:
            return self.idle.sum() * 0
        rows = [group.rows(batch) for group in groups]
        if step == 0:
            for group, (x, _) in zip(groups, rows, strict=True):
                init_b_dec(group.sae, x, group.b_dec_start, self.all_sum, group.means)
        moments = self.sums([g.moments(*row) for g, row in zip(groups, rows, strict=True)])
        num_dead = (self.num_dead or self.count_dead()).read()  # counted a step ago
        if self.skips:
            self.before = [[buffer.clone() for buffer in g.buffers()] for g in groups]
        sizes = [batch.sizes_of(g.layers) for g in groups]
        losses = [
            group.step(*row, moment, dead, step / num_steps, self.all_sum, size)
            for group, row, moment, dead, size in zip(
                groups, rows, moments, num_dead, sizes, strict=True
            )
        ]
        loss = torch.stack(losses)
        *fired, bad = self.sums([*(g.fired for g in groups), ~loss.detach().isfinite()])
        self.bad = bad > 0 if self.skips else None
        for group, times in zip(groups, fired, strict=True):
            group.count_dead(times > 0)
            if self.sharing > 1:
                for state in group.sae.running_state():
                    state.copy_(self.all_sum(state) / self.sharing)
        self.num_dead = self.count_dead()
        # DDP averages gradients over processes; the denominators of the loss are global already
        return loss.sum() * self.sharing

    def before_update(self) -> list[Tensor] | None:
        """Set the rates, project and clip each group's gradients; return who leaves the step out.

        Returns:
            For each group 1.0 if its loss or gradient is not finite, otherwise 0.0; None if that
            does not matter.
        """
        self.optim.schedule(self.optimizer, *self.position)
        norms = [group.clip_gradient() for group in self.groups]
        if self.bad is None:
            return None
        self.bad = self.bad | ~torch.stack(norms).isfinite()
        for group, bad, before in zip(self.groups, self.bad, self.before, strict=True):
            group.leave_out(bad, before, self.position[0] + 1)
        self.num_dead = self.count_dead()  # again: the counters may have gone back
        return list(self.bad.float().unbind())

    def after_update(self) -> None:
        """Make the directions of all latents unit vectors."""
        unless = [None] * len(self.groups) if self.bad is None else self.bad
        for group, bad in zip(self.groups, unless, strict=True):
            group.normalize_decoder(bad)

    def count_dead(self) -> Readback:
        """Return how many latents of each group are dead, for the next step to read."""
        return Readback(torch.stack([group.dead().sum() for group in self.groups]))

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes that train an SAE together.

        Not by Lightning's strategy, which puts a barrier before it: there the host would wait for
        a GPU. After the last step Lightning moves the SAEs to the host, where NCCL sums nothing:
        even then the sum is made on the device.
        """
        if self.sharing == 1:
            return value
        total = value.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def sums(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the sums of several vectors, by one collective."""
        return self.all_sum(torch.cat(list(parts))).split([len(part) for part in parts])

    def running_stats(self, restart: bool = False) -> dict[str, RunningStats]:
        """Return the figures since last restarted, by group."""
        stats = {g.name: g.running_stats(self.all_sum, self.sharing) for g in self.groups}
        for group in self.groups if restart else ():
            group.start_running()
        return stats
