"""The training step that one group or many of them share."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from groupsae.data.batch import ActivationBatch
from groupsae.runtime.errors import UserError
from groupsae.training.b_dec_init import start_b_dec
from groupsae.training.nonfinite import (
    MOST_IN_A_ROW,
    Undo,
    layers_not_finite,
    left_out,
    stopped,
    too_many,
)
from groupsae.training.optim import Adam
from groupsae.training.readback import Readback
from groupsae.training.validation import Validated, mean_of


class SAETraining(Validated):
    """The step over all `members`: one forward, summed losses, one Adam, clipping per member.

    Summing (not averaging) and clipping each member alone keep the members independent: trained
    together they get bit for bit what each gets alone.
    """

    optim: Adam
    dead_after: int
    b_dec_start: str
    nonfinite: str
    undo: Undo | None = None  # of the step that is being taken, where steps may be left out
    num_dead: Readback | None = None  # before the first step, of a resumed run as well
    told_of_skips: bool = False

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> Tensor:
        """Return the summed loss of all members; nothing in it waits for the device."""
        loss = self.step_members(batch) if self.members() else self.idle.sum() * 0
        # DDP averages gradients over processes; the loss's denominators are already global
        return loss * self.shared_by()

    def step_members(self, batch: ActivationBatch) -> Tensor:
        """Return the summed loss of this process's members, and keep their books."""
        members, progress = self.members(), self.progress()
        rows = [m.rows(batch) for m in members]
        if self.global_step == 0:
            for member, (x, _) in zip(members, rows, strict=True):
                start_b_dec(member.sae, x, self.b_dec_start, self.all_sum)
        mine = [m.moments(*row) for m, row in zip(members, rows, strict=True)]
        moments = self.all_sum(torch.cat(mine)).split([len(each) for each in mine])
        num_dead = (self.num_dead or self.note_dead()).read()
        self.undo = Undo(members) if self.nonfinite == "skip" else None
        losses = [
            m.step(*row, moment, dead, progress, self.all_sum)
            for m, row, moment, dead in zip(members, rows, moments, num_dead, strict=True)
        ]
        noted = [m.fired for m in members]
        if self.undo is not None:
            noted.append(~torch.stack(losses).detach().isfinite())
        fired = self.all_sum(torch.cat(noted))
        if self.undo is not None:
            fired, bad = fired.split([len(fired) - len(members), len(members)])
            self.undo.note_losses(bad > 0)
        widths = [m.sae.d_sae for m in members]
        for member, times in zip(members, fired.split(widths), strict=True):
            member.count_dead(times > 0)
            if self.shared_by() > 1:
                for state in member.sae.followed():
                    state.copy_(self.all_sum(state) / self.shared_by())
        self.num_dead = self.note_dead()
        return torch.stack(losses).sum()

    def on_train_start(self) -> None:
        """Forget what an earlier fit noted: the counters may come from a checkpoint."""
        self.num_dead = None
        for member in self.members():
            member.start_running()

    def on_train_batch_end(self, *_: Any) -> None:
        """Log, once the step is settled."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.global_step % every == 0:
            self.log_training()

    def note_dead(self) -> Readback:
        """Return how many latents of each member are dead, for the next step to read."""
        return Readback(torch.stack([m.dead().sum() for m in self.members()]))

    def progress(self) -> float:
        """Return the share of the training that is done; schedules are functions of it."""
        return self.global_step / self.num_steps()

    def num_steps(self) -> int:
        """Return the steps of the whole training."""
        steps: int = self.trainer.datamodule.num_steps  # type: ignore[attr-defined]
        return steps

    def all_sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes that train an SAE together.

        Not by Lightning's strategy, which puts a barrier before it: there the host would wait for
        a GPU. After the last step Lightning brings the suite back to the host, where NCCL sums
        nothing: then the sum is made on the device all the same.
        """
        if self.shared_by() == 1:
            return value
        total = value.to(self.trainer.strategy.root_device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def log_training(self) -> None:
        """Log what accumulated since the last time: nothing is read for the log in between."""
        said = self.of_all(
            {m.name: m.read_running(self.all_sum, self.shared_by()) for m in self.members()}
        )
        for name, read in said.items():
            for figure, value in read.values.items():
                # the same in all processes: all stop together
                self.check_finite(name, value, read.steps, read.finite)
                self.log(f"train/{figure}/{name}", value, rank_zero_only=True)
            if self.nonfinite == "skip":
                self.check_skips(name, *read.skipped)
        serving = [said[name].values for name in set(self.serving().values())]
        if all("fvu" in values for values in serving):  # none of an SAE that left out every step
            self.shown["fvu"] = mean_of(values["fvu"] for values in serving)

    def check_finite(self, name: str, value: float, steps: int, finite: int) -> None:
        """Raise UserError if a value of a member has become NaN or infinite.

        Every process has to ask about the same value.

        Args:
            name: of the member.
            value: a sum over the steps since last logged, or over the weights.
            steps: since last logged.
            finite: how many of them came before the first whose loss was not finite.
        """
        if not math.isfinite(value):
            first = min(self.global_step, self.global_step - steps + finite + 1)
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            raise UserError(stopped(name, first, self.num_steps(), layers_not_finite(data, first)))

    def check_skips(self, name: str, times: int, in_a_row: int, last: int) -> None:
        """Say when the first step is left out; raise UserError if a member takes none any more.

        Args:
            name: of the member.
            times: steps that it has left out.
            in_a_row: of them, without one between that it took.
            last: number of the last.
        """
        tell = times > 0 and not self.told_of_skips
        if in_a_row < MOST_IN_A_ROW and not tell:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        layers = layers_not_finite(data, last)
        if in_a_row >= MOST_IN_A_ROW:
            raise UserError(too_many(name, last, self.num_steps(), layers))
        self.told_of_skips = True
        if self.trainer.is_global_zero:
            warnings.warn(left_out(name, times, last, layers), stacklevel=2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are already spoilt."""
        sums = {}
        for m in self.members():
            weights = sum(float(p.detach().abs().sum()) for p in m.sae.parameters())
            finite = m.finite_steps(self.all_sum, self.shared_by())
            running = float(self.all_sum(m.running).sum())  # the same in all processes
            sums[m.name] = (weights + running, m.running_steps, finite)
        for name, (value, steps, finite) in self.of_all(sums).items():
            self.check_finite(name, value, steps, finite)

    # ---- optimiser ----------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one Adam with a named parameter group for each member.

        A process that owns no SAE steps a number that is of no use: Lightning counts steps of
        optimisers.
        """
        if not self.members():
            self.idle = torch.zeros(1, requires_grad=True)
            return self.optim.build([{"params": [self.idle], "name": "idle", "lr": 0.0}], False)
        return self.optim.build(
            [
                {
                    "params": list(m.sae.parameters()),
                    "name": m.name,
                    "lr": self.optim.lr(m.sae.d_sae),
                }
                for m in self.members()
            ],
            skips=self.nonfinite == "skip",
        )

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Project the decoders' gradients, then clip each member on its own (in that order)."""
        norms = []
        for member in self.members():
            member.sae.project_gradient()
            norms.append(nn.utils.clip_grad_norm_(member.sae.parameters(), self.optim.clip_norm))
        if self.undo is not None:
            adam: Any = self.trainer.optimizers[0]
            adam.left_out = self.undo.settle(norms, self.global_step + 1)
            self.num_dead = self.note_dead()  # anew: counters may have gone back

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step at the schedule's rate, then normalise: every checkpoint holds unit decoders."""
        self.optim.schedule(self.trainer.optimizers[0], self.global_step, self.num_steps())
        super().optimizer_step(*args, **kwargs)
        if self.undo is not None:
            self.undo.normalize_decoders()
            return
        for member in self.members():
            member.sae.normalize_decoder()
