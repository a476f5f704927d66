"""All groups of a partition, fed by one forward of the language model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from groupsae.data.batch import ActivationBatch
from groupsae.grouping.plan import GroupPlan, PlannedSAE
from groupsae.runtime.errors import UserError, check_choice
from groupsae.training.b_dec_init import STARTS
from groupsae.training.group import GroupSAE, JointStep, SAEFactory
from groupsae.training.metrics import is_logging_step, log_training, log_validation, steps_of
from groupsae.training.nonfinite import ACTIONS, check_finite
from groupsae.training.optim import Adam
from groupsae.training.parallel.collect import gather_named, num_processes

T = TypeVar("T")


class Size(NamedTuple):
    """Size of an SAE, known before it is trained.

    Attributes:
        d_sae: number of latents.
        parameters: numbers in all its weights.
        kept_wide: as in `SAE`.
        flops: FLOPs of a training step, per row.
        maps: whether its layers have something of their own, `SAE.maps`.
    """

    d_sae: int
    parameters: int
    kept_wide: float
    flops: int
    maps: bool


class GroupSAESuite(L.LightningModule):
    """Holds one `GroupSAE` for each group of the plan; the plan arrives after construction.

    The grouping callback measures the layers in its `setup` and calls `set_plan`; Lightning then
    calls `configure_model`, which builds the SAEs. Its arguments are those of `GroupSAE`.

    Attributes:
        plan: all SAEs of all processes.
        own: numbers in the plan of the SAEs that this process holds.
        spread: True if each SAE is in one process, not in all.
        groups: number in the plan -> `GroupSAE`; None before `configure_model`.
    """

    plan: GroupPlan
    joint: JointStep

    def __init__(
        self,
        *,
        sae: SAEFactory,
        d_model: int,
        optim: Adam,
        dead_after: int,
        b_dec_start: str,
        nonfinite: str,
        seed: int,
    ) -> None:
        super().__init__()
        check_choice("b_dec_start", b_dec_start, ("auto", *STARTS))
        self.b_dec_start = b_dec_start  # `auto` until the layers are measured
        check_choice("nonfinite", nonfinite, ACTIONS)
        self.make_sae, self.d_model, self.optim, self.nonfinite = sae, d_model, optim, nonfinite
        self.means: Mapping[int, Tensor] | None = None
        self.make_group = partial(
            GroupSAE,
            d_model=d_model,
            optim=optim,
            dead_after=dead_after,
            nonfinite=nonfinite,
            seed=seed,
        )
        self.own: list[int] = []
        self.spread = False
        self.groups: nn.ModuleDict | None = None
        self.shown: dict[str, float] = {}  # figures for the progress bar
        self.sizes: dict[tuple[float, int], Size] = {}
        self.d_sae = self.size(1.0).d_sae  # raises UserError if the SAE is impossible

    # ---- the plan and its SAEs ------------------------------------------------------------

    def set_plan(
        self,
        plan: GroupPlan,
        norm_factors: Mapping[int, float],
        own: Sequence[int] | None = None,
        means: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Choose the groups to train, the scale of each layer, and its mean, where known.

        `own` are the numbers in the plan of the SAEs that this process holds, where they are
        spread over the processes; None where each process holds all.
        """
        self.plan, self.norm_factors, self.means = plan, dict(norm_factors), means
        self.spread = own is not None
        self.own = list(range(len(plan.members)) if own is None else own)

    def configure_model(self) -> None:
        """Build this process's SAEs; Lightning calls it again for validation.

        Their names in the state dict are their numbers in the plan, whoever holds them.
        """
        if self.groups is None:
            planned = self.plan.members
            groups = {str(i): self.make_member(planned[i]) for i in self.own}
            self.groups = nn.ModuleDict(groups)

    def size(self, width: float, num_layers: int = 1) -> Size:
        """Return the size of an SAE with a share of the configured number of latents."""
        if (width, num_layers) not in self.sizes:
            sae = self.factory(width)(
                d_model=self.d_model, generator=torch.Generator(), layers=range(num_layers)
            )
            self.sizes[width, num_layers] = Size(
                d_sae=sae.d_sae,
                parameters=sum(p.numel() for p in sae.parameters()),
                kept_wide=sae.kept_wide,
                flops=sae.training_flops(),
                maps=sae.maps is not None,
            )
        return self.sizes[width, num_layers]

    def sizes_of(self, members: Sequence[PlannedSAE]) -> list[Size]:
        """Return the sizes of some SAEs of a plan.

        Raises:
            UserError: the width of one leaves too few latents; names it.
        """
        sizes = []
        for member in members:
            with _named(member):
                sizes.append(self.size(member.width, len(member.layers)))
        return sizes

    def factory(self, width: float) -> SAEFactory:
        """Return the factory of SAEs with a share of the configured number of latents."""
        if width == 1:
            return self.make_sae
        return partial(self.make_sae, expansion=None, d_sae=round(self.d_sae * width))

    def make_member(self, planned: PlannedSAE) -> GroupSAE:
        """Return a fresh group.

        Raises:
            UserError: its width leaves too few latents; names it.
        """
        with _named(planned):
            return self.make_group(
                name=planned.name,
                layers=planned.layers,
                norm_factors=self.norm_factors,
                sae=self.factory(planned.width),
                means=self.means,
                b_dec_start=self.b_dec_start.replace("auto", "zero"),  # auto: only in a trial
            )

    def members(self) -> list[GroupSAE]:
        """Return the groups that this process holds, in the order of the plan."""
        assert self.groups is not None
        return list(self.groups.values())  # type: ignore[arg-type]

    def serving(self) -> dict[int, str]:
        """Return layer -> the name of its SAE in the chosen partition."""
        names = zip(self.plan.names, self.plan.saes, strict=True)
        return {layer: name for name, layers in names for layer in layers}

    def collect(self, own: dict[str, T]) -> dict[str, T]:
        """Return the values of all groups, by name in the order of the plan."""
        if not self.spread:
            return own
        found = gather_named(own)
        return {planned.name: found[planned.name] for planned in self.plan.members}

    # ---- Lightning's hooks, as those of `GroupSAE` ----------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Begin a fit: a joint step of all groups that this process holds."""
        sharing = 1 if self.spread else num_processes()
        self.joint = JointStep(self.members(), self.optim, self.nonfinite, sharing, self.device)
        return self.joint.optimizer

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> Tensor:
        """Return the summed loss."""
        return self.joint.loss(batch, self.global_step, steps_of(self))

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the running means, at every logging step."""
        if is_logging_step(self):
            stats = self.collect(self.joint.running_stats(restart=True))
            log_training(self, stats, set(self.serving().values()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite; note which partition they belong to."""
        check_finite(self, self.collect(self.joint.running_stats()))
        checkpoint["plan"] = self.plan.hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that checkpoint and run folder hold the same partition.

        Raises:
            UserError: they do not; here, before the weights fail on their shapes.
        """
        if checkpoint["plan"] != self.plan.hash:
            raise UserError(
                f"the checkpoint holds the partition {checkpoint['plan'][:8]}, but groups.json "
                f"now gives {self.plan.hash[:8]} ({self.plan.saes}). Restore the groups.json that "
                "belongs to the checkpoint, or start a new run."
            )

    def on_validation_epoch_start(self) -> None:
        """Start empty metrics; a process that sees everything sums nothing over the others."""
        for group in self.members():
            group.start_validation(sync=not self.spread)

    def validation_step(self, batch: Iterable[ActivationBatch], batch_idx: int) -> None:
        """Reconstruct every layer with each of its SAEs."""
        for part in batch:
            for group in self.members():
                group.validate(part)

    def on_validation_epoch_end(self) -> None:
        """Log fvu and l0 per layer and per SAE."""
        self.val_results = self.collect({g.name: g.validated() for g in self.members()})
        log_validation(self, self.val_results, self.serving())


@contextmanager
def _named(planned: PlannedSAE) -> Iterator[None]:
    """Name a smaller SAE in an error; of those of full width, the error names the option."""
    try:
        yield
    except UserError as error:
        if planned.width == 1:
            raise
        raise UserError(
            f"the smaller SAE {planned.name}: {error} Raise sae.expansion (or sae.d_sae), or "
            "leave small numbers out of groups.smaller."
        ) from None
