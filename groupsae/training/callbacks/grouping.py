"""Before fitting: measure the layers, choose the groups, give them to the suite."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from groupsae.cost.model import RunCost, Workload, run_cost
from groupsae.data.activations import ActivationDataModule
from groupsae.data.exchange import all_to_all
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.grouping.choices import Choice
from groupsae.grouping.partition import Partition
from groupsae.grouping.plan import GroupPlan, PlannedSAE, name_of
from groupsae.grouping.rules import needs_distances
from groupsae.grouping.shares import advice, described, mean_dominates
from groupsae.runtime.errors import UserError, check_choice
from groupsae.suite.groups_file import load_plan
from groupsae.training.estimate import bytes_free, bytes_needed, forecast, refuse
from groupsae.training.measure import SCALES, Measurement, measure, provenance_of
from groupsae.training.parallel.collect import gather
from groupsae.training.parallel.placement import describe, owners, spread
from groupsae.training.parallel.strategies import SAEParallel
from groupsae.training.suite import GroupSAESuite, Size


class GroupLayers(L.Callback):
    """Computes distances and AMAD in `setup`, before the SAEs are built.

    The partition is an artefact: `groups.json` and `angles.npz` in the run folder. A resumed
    run reads them back; its checkpoint only confirms the partition.

    Attributes:
        plan: the groups that are trained.
        measurement: the measurement that they were chosen by.
        work: model, text and budget of the run, for the cost model.
        cost: FLOPs of the run.
        other: the groups that the other centring would have given; None if it was not measured.
        step_seconds: size of an SAE -> one step with one row per token, in a run of all
            groupings; None for others.
    """

    plan: GroupPlan
    measurement: Measurement
    work: Workload
    cost: RunCost
    other: Partition | None = None
    step_seconds: dict[Size, float] | None = None

    def __init__(
        self,
        *,
        choice: Choice,
        folder: str,
        cache: str,
        tokens: int,
        centring: str,
        scale: str,
        show: Callable[[str], object],
    ) -> None:
        check_choice("calibration.scale", scale, SCALES)
        self.choice, self.folder, self.cache, self.show = choice, Path(folder), Path(cache), show
        self.tokens, self.centring, self.scale = tokens, centring, scale
        self.by_rule: dict[str, str] = {}  # option -> value, where the option is auto
        self.groups_file = self.folder / "groups.json"
        self.angles_file = self.folder / "angles.npz"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the groups, once."""
        assert isinstance(pl_module, GroupSAESuite)
        if stage != "fit" or hasattr(pl_module, "plan"):
            return
        suite, data = pl_module, trainer.datamodule  # type: ignore[attr-defined]
        self.choice.check(data.lm.geometry.num_layers)
        # one answer for all processes, before the first one writes the files
        if trainer.strategy.broadcast(self.groups_file.exists() and self.angles_file.exists()):
            self.read(data)
        else:
            # one SAE at least: before the long measurement
            one = PlannedSAE(name_of([0]), [0], 1.0)
            _refuse(trainer, bytes_needed(suite, data, [one], trainer.world_size), 1)
            self.measurement = self.measured(trainer, data)
            measured = self.measurement
            self.plan = self.choice.plan(measured.distances, measured.cosines)
        if self.measurement.other_distances is not None:
            other = self.measurement.other_distances, self.measurement.other_cosines
            self.other = self.choice.plan(*other).partition
        data.set_slots(self.plan.slots)
        self.place(trainer, suite, data)
        data.reader.fill_training()
        if self.plan.others:
            device = trainer.strategy.root_device
            sentence, self.step_seconds = forecast(suite, data, device, trainer.world_size)
            self.show(sentence)
        self.count_cost(suite, data)
        if trainer.is_global_zero:
            self.write(data)

    # ---- steps of setup -------------------------------------------------------------------

    def measured(self, trainer: L.Trainer, data: ActivationDataModule) -> Measurement:
        """Measure the layers; with centring=auto again, centred, if the mean dominates."""
        centring = "none" if self.centring == "auto" else self.centring
        found = measure(data, trainer, self.tokens, centring, self.cache)
        if self.centring == "auto" and mean_dominates(found.shares):
            return measure(data, trainer, self.tokens, "mean", self.cache)
        return found

    def read(self, data: ActivationDataModule) -> None:
        """Read the groups of an earlier start of this run."""
        self.confirm(data)
        self.measurement = Measurement.load(self.angles_file)
        plan = load_plan(self.folder)
        assert plan is not None
        self.plan = plan

    def confirm(self, data: ActivationDataModule) -> None:
        """Check that the run folder was made with today's model, weights and text.

        Raises:
            UserError: something has changed since; names it.
        """
        stored = (read_json(self.groups_file) or {}).get("measured", {})
        today = provenance_of(data, self.tokens, self.centring)
        if self.centring == "auto":
            today["centring"] = stored.get("centring")
        del today["model"]  # its folder may have moved; `weights` identifies it
        changed = [name for name, value in today.items() if stored.get(name) != value]
        if changed:
            raise UserError(
                f"{self.folder} was made with other values of {', '.join(changed)}. Restore "
                "them, give another output=<folder> to keep both runs, or overwrite=true to "
                "start this run again."
            )

    def place(self, trainer: L.Trainer, suite: GroupSAESuite, data: ActivationDataModule) -> None:
        """Give the plan to the suite: all SAEs to each process, or to each its own."""
        factors, means = self.measurement.norm_factors(self.scale), self.measurement.layer_means()
        if self.centring == "auto":
            self.by_rule["calibration.centring"] = self.measurement.provenance["centring"]
        if suite.b_dec_start == "auto":
            dominates = mean_dominates(self.measurement.shares)
            suite.b_dec_start = "mean" if dominates else "zero"
            self.by_rule["b_dec_start"] = suite.b_dec_start
        if not isinstance(trainer.strategy, SAEParallel):
            saes = self.plan.members
            _refuse(trainer, bytes_needed(suite, data, saes, trainer.world_size), len(saes))
            suite.set_plan(self.plan, factors, means=means)
            return
        owned = owners(suite, data, self.plan, trainer.world_size)
        rank, swap = trainer.global_rank, all_to_all(trainer.strategy.mesh)
        suite.set_plan(self.plan, factors, owned[rank], means)
        shares = spread(suite, data, owned, rank, swap)
        self.show(describe(shares))
        _refuse(trainer, shares[rank].memory, len(owned[rank]))

    def count_cost(self, suite: GroupSAESuite, data: ActivationDataModule) -> None:
        """Work out the FLOPs of the run."""
        plain = [suite.size(planned.width) for planned in self.plan.members]
        sizes = suite.sizes_of(self.plan.members)
        self.work = Workload(
            num_layers=data.lm.geometry.num_layers,
            layers_run=data.used_layers()[-1] + 1,
            d_model=suite.d_model,
            sae_flops={size.d_sae: size.flops for size in plain},
            context=data.packing.context,
            tokens=data.num_steps * data.tokens_per_step,
            calibration_tokens=self.measurement.tokens,
            calibration_passes=self.measurement.passes,
            layers_per_token=data.layers_per_token,
            # (the same for all that have any, which have full width)
            maps_flops=max(a.flops - b.flops for a, b in zip(sizes, plain, strict=True)),
        )
        self.cost = run_cost(
            self.work,
            num_groups=self.plan.partition.num_groups,
            saes=[len(layers) for layers in self.plan.saes],
            d_sae=suite.d_sae,
            distances=needs_distances(self.plan.partition.rule),
        )

    def recorded(self) -> dict[str, Any]:
        """Return what else was measured: shares of the norm, and the other centring's groups."""
        measured, other = self.measurement, self.other
        return {
            "shares": measured.shares.to_json(),
            "other": other and {"centring": measured.other_centring, **other.to_json()},
        }

    def chosen(self) -> str | None:
        """Return what was chosen by the shares of the norm, and why; None if nothing was."""
        if not self.by_rule:
            return None
        values = " ".join(f"{key}={value}" for key, value in self.by_rule.items())
        return f"Chosen: {values}, as {described(self.measurement.shares)}."

    def advice(self, overrides: Sequence[str]) -> str | None:
        """Return the advice of `shares.advice` on the command with these arguments."""
        measured, other = self.measurement, self.other
        return advice(
            measured.shares,
            centring=measured.provenance["centring"],
            filtered=measured.provenance["max_norm_ratio"] is not None,
            groups=None if other is None else (self.plan.partition.groups, other.groups),
            overrides=overrides,
        )

    def write(self, data: ActivationDataModule) -> None:
        """Write `groups.json` and `angles.npz`."""
        self.measurement.save(self.angles_file)
        values = {
            "plan": self.plan.to_json(),
            "hash": self.plan.hash,
            "saes": {planned.name: planned.layers for planned in self.plan.members},
            "measured": self.measurement.provenance,
            "copies": data.copies,
            **self.recorded(),
        }
        write_json(self.groups_file, values)


def _refuse(trainer: L.Trainer, needed: int, num_saes: int) -> None:
    """Stop all processes if one of them has too little memory."""
    device = trainer.strategy.root_device
    free = bytes_free(device, trainer.num_devices)
    for each in gather((needed, free, num_saes, str(device))):
        refuse(*each)
