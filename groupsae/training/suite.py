"""All groups of a partition, fed by one forward of the language model."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from groupsae.grouping.plan import GroupPlan, PlannedSAE
from groupsae.runtime.errors import UserError
from groupsae.training.b_dec_init import check_b_dec_start
from groupsae.training.group import GroupSAE, SAEFactory
from groupsae.training.nonfinite import check_nonfinite
from groupsae.training.optim import Adam
from groupsae.training.step import SAETraining


class Size(NamedTuple):
    """What can be known of an SAE before it is made.

    Attributes:
        d_sae: number of latents.
        parameters: numbers in all its weights.
        kept_wide: as in `SAE`.
        flops: of a training step, per token.
    """

    d_sae: int
    parameters: int
    kept_wide: float
    flops: int


class GroupSAESuite(SAETraining):
    """One `GroupSAE` for each group of the plan; the plan arrives after construction.

    The grouping callback measures the layers in its `setup` and calls `set_plan`; Lightning then
    calls `configure_model`, which builds the SAEs.

    Args:
        sae: factory of an SAE.
        d_sae: number of latents that the factory is configured with.
        d_model: width of the residual stream.
        optim: the optimiser's recipe.
        dead_after: tokens without firing after which a latent counts as dead.
        b_dec_start: where the decoders' biases start, see `start_b_dec`.
        nonfinite: what becomes of a step whose loss or gradient is not finite: `stop` ends the
            run, `skip` leaves the step out for the SAE that it concerns.
        seed: of the initial weights.
    """

    def __init__(
        self,
        *,
        sae: SAEFactory,
        d_sae: int,
        d_model: int,
        optim: Adam,
        dead_after: int,
        b_dec_start: str,
        nonfinite: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.make_sae, self.d_sae, self.d_model = sae, d_sae, d_model
        self.optim, self.dead_after, self.seed = optim, dead_after, seed
        check_b_dec_start(b_dec_start)
        check_nonfinite(nonfinite)
        self.b_dec_start, self.nonfinite = b_dec_start, nonfinite
        self.plan: GroupPlan | None = None
        self.own: list[int] = []
        self.groups: nn.ModuleDict | None = None
        self._sizes: dict[float, Size] = {}

    def set_plan(
        self,
        plan: GroupPlan,
        norm_factors: Mapping[int, float],
        own: Sequence[int] | None = None,
    ) -> None:
        """Tell the suite which groups to train and how to scale each layer.

        Args:
            plan: of all SAEs.
            norm_factors: layer -> what its activations are multiplied by.
            own: numbers in the plan of the SAEs that this process holds, where they are spread
                over the processes; None where each process holds all.
        """
        self.plan, self.norm_factors = plan, dict(norm_factors)
        self.spread = own is not None
        self.own = list(range(len(plan.members)) if own is None else own)

    def configure_model(self) -> None:
        """Build this process's SAEs; called again by Lightning for validation, does nothing then.

        Their names in the state dict are their numbers in the plan, whoever holds them.
        """
        if self.groups is not None:
            return
        assert self.plan is not None, "set_plan comes first"
        slots, planned = self.slots_of(self.own), self.plan.members
        self.groups = nn.ModuleDict(
            {
                str(i): self.make_member(planned[i], slots.index(planned[i].layers))
                for i in self.own
            }
        )

    def slots_of(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the sets of layers that some SAEs of the plan draw from, in the plan's order."""
        assert self.plan is not None
        needed = [self.plan.members[i].layers for i in indices]
        return [slot for slot in self.plan.slots if slot in needed]

    def size(self, width: float) -> Size:
        """Return what an SAE of a width is like."""
        if width not in self._sizes:
            sae = self._sized(width)(d_model=self.d_model, generator=torch.Generator())
            self._sizes[width] = Size(
                sae.d_sae,
                sum(p.numel() for p in sae.parameters()),
                sae.kept_wide,
                sae.training_flops(),
            )
        return self._sizes[width]

    def make_member(self, planned: PlannedSAE, slot: int) -> GroupSAE:
        """Return a fresh member.

        Args:
            planned: of the plan.
            slot: which rows of a batch are its own.

        Raises:
            UserError: its width leaves too few latents; names it.
        """
        try:
            return GroupSAE(
                name=planned.name,
                layers=planned.layers,
                norm_factors=self.norm_factors,
                sae=self._sized(planned.width),
                d_model=self.d_model,
                optim=self.optim,
                dead_after=self.dead_after,
                b_dec_start=self.b_dec_start,
                nonfinite=self.nonfinite,
                seed=self.seed,
                slot=slot,
            )
        except UserError as error:  # too few latents: at full width that was seen before
            raise UserError(
                f"the smaller SAE {planned.name}: {error} Raise sae.expansion (or sae.d_sae), or "
                "leave small numbers out of groups.smaller."
            ) from None

    def _sized(self, width: float) -> SAEFactory:
        """Return the factory of SAEs with a share of the configured number of latents."""
        if width == 1:
            return self.make_sae
        return partial(self.make_sae, expansion=None, d_sae=round(self.d_sae * width))

    def serving(self) -> dict[int, str]:
        """Return layer -> the name of its SAE in the chosen partition."""
        assert self.plan is not None
        names = zip(self.plan.names, self.plan.saes, strict=True)
        return {layer: name for name, layers in names for layer in layers}

    def members(self) -> list[GroupSAE]:
        """Return the groups that this process holds, in the order of the plan."""
        assert self.groups is not None
        return list(self.groups.values())  # type: ignore[arg-type]

    def all_names(self) -> list[str]:
        """Return the names of all groups in the order of the plan."""
        assert self.plan is not None
        return [planned.name for planned in self.plan.members]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which partition the weights belong to."""
        super().on_save_checkpoint(checkpoint)
        assert self.plan is not None
        checkpoint["plan"] = self.plan.hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Confirm that checkpoint and run folder speak of the same partition.

        Raises:
            UserError: they do not; said here, before the weights fail on their shapes.
        """
        assert self.plan is not None
        if checkpoint["plan"] != self.plan.hash:
            raise UserError(
                f"the checkpoint holds the partition {checkpoint['plan'][:8]}, but groups.json "
                f"now gives {self.plan.hash[:8]} ({self.plan.saes}). Bring back the groups.json "
                "that belongs to the checkpoint, or start a new run."
            )
