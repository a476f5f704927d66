"""Before fitting: measure the layers, choose the groups, hand them to the suite."""

from collections.abc import Callable
from pathlib import Path

import lightning as L

from groupsae.cost.model import RunCost, Workload, run_cost
from groupsae.data.activations import ActivationDataModule
from groupsae.data.exchange import all_to_all
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.grouping.choices import Choice
from groupsae.grouping.plan import GroupPlan
from groupsae.grouping.rules import needs_distances
from groupsae.runtime.errors import UserError
from groupsae.suite.groups_file import load_plan
from groupsae.training.estimate import Forecast, bytes_free, bytes_needed, forecast, refuse
from groupsae.training.measure import Measurement, check_scale, measure, provenance_of
from groupsae.training.parallel.collect import gather
from groupsae.training.parallel.placement import describe, owners, spread
from groupsae.training.parallel.strategies import SAEParallel
from groupsae.training.suite import GroupSAESuite


class GroupLayers(L.Callback):
    """Computes distances and AMAD in `setup`, before the SAEs are built.

    The partition is an artefact: `groups.json` and `angles.npz` in the run folder. A resumed
    run reads them back; its checkpoint only confirms the partition.

    Args:
        choice: the rule that makes the groups.
        folder: run folder.
        cache: folder for measurements shared between runs.
        tokens: calibration tokens to measure on.
        centring: `none` (the paper's formula) or `mean`.
        scale: the rule for norm factors, see `Measurement.norm_factors`.
        say: prints what a run of all groupings will need.
    """

    def __init__(
        self,
        *,
        choice: Choice,
        folder: str,
        cache: str,
        tokens: int,
        centring: str,
        scale: str,
        say: Callable[[str], object],
    ) -> None:
        self.choice, self.folder, self.cache, self.say = choice, Path(folder), Path(cache), say
        self.tokens, self.centring = tokens, centring
        check_scale(scale)
        self.scale = scale
        self.measurement: Measurement | None = None
        self.plan: GroupPlan | None = None
        self.work: Workload | None = None
        self.cost: RunCost | None = None
        self.forecast: Forecast | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the groups, once."""
        assert isinstance(pl_module, GroupSAESuite)
        if stage != "fit" or hasattr(pl_module, "plan"):
            return
        data: ActivationDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.choice.check(data.lm.geometry.num_layers)
        groups_file, angles_file = self.folder / "groups.json", self.folder / "angles.npz"
        # one answer for all processes, taken before rank 0 writes the files
        if trainer.strategy.broadcast(groups_file.exists() and angles_file.exists()):
            self.confirm(data)
            self.measurement = Measurement.load(angles_file)
            self.plan = load_plan(self.folder)
            assert self.plan is not None
        else:
            least = [1.0] * self.choice.least_saes(data.lm.geometry.num_layers)
            if isinstance(trainer.strategy, SAEParallel):
                least = least[:: trainer.world_size]  # the share of one process
            self._check_memory(trainer, pl_module, data, least)
            self.measurement = measure(data, trainer, self.tokens, self.centring, self.cache)
            self.plan = self.choice.plan(self.measurement.distances)
        if not self.plan.saes:
            raise UserError("the partition has no group to train.")
        data.set_slots(self.plan.slots)
        factors = self.measurement.norm_factors(self.scale)
        if isinstance(trainer.strategy, SAEParallel):
            owned = owners(pl_module, self.plan, trainer.world_size)
            rank, swap = trainer.global_rank, all_to_all(trainer.strategy.mesh)
            pl_module.set_plan(self.plan, factors, owned[rank])
            found = spread(pl_module, data, owned, rank, swap)
            self.say(describe(found))
            self._refuse(trainer, found[rank].memory, len(owned[rank]))
        else:
            widths = [planned.width for planned in self.plan.members]
            self._check_memory(trainer, pl_module, data, widths)
            pl_module.set_plan(self.plan, factors)
        data.fill_training()
        if self.plan.others:
            device = trainer.strategy.root_device
            self.forecast = forecast(pl_module, data, device, trainer.world_size)
            self.say(str(self.forecast))
        if trainer.global_rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.measurement.save(angles_file)
            write_json(
                groups_file,
                {
                    "plan": self.plan.to_json(),
                    "hash": self.plan.hash,
                    "saes": {planned.name: planned.layers for planned in self.plan.members},
                    "measured": self.measurement.provenance,
                },
            )

    def _check_memory(
        self,
        trainer: L.Trainer,
        suite: GroupSAESuite,
        data: ActivationDataModule,
        widths: list[float],
    ) -> None:
        # spread SAEs see all rows of a step
        sharing = 1 if isinstance(trainer.strategy, SAEParallel) else trainer.world_size
        needed = bytes_needed(suite, data, widths, sharing)
        self._refuse(trainer, needed, len(widths))

    def _refuse(self, trainer: L.Trainer, needed: int, num_saes: int) -> None:
        """Stop all processes if one of them has too little memory."""
        device = trainer.strategy.root_device
        mine = needed, bytes_free(device, trainer.num_devices), num_saes, str(device)
        for each in gather(mine):
            refuse(*each)

    def confirm(self, data: ActivationDataModule) -> None:
        """Check that the run folder was made with today's model, weights and text.

        Raises:
            UserError: something has changed since; names what.
        """
        stored = (read_json(self.folder / "groups.json") or {}).get("measured", {})
        today = provenance_of(data, self.tokens, self.centring)
        changed = [name for name, value in today.items() if stored.get(name) != value]
        if changed:
            raise UserError(
                f"{self.folder} was made with another {' and another '.join(changed)} (the files "
                "have changed since). overwrite=true starts the run again; output=<folder> keeps "
                "both."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Work out the cost, now that the SAEs and their widths are there."""
        assert isinstance(pl_module, GroupSAESuite)
        assert self.plan is not None
        assert self.measurement is not None
        data: ActivationDataModule = trainer.datamodule  # type: ignore[attr-defined]
        sizes = [pl_module.size(planned.width) for planned in self.plan.members]
        flops = {size.d_sae: size.flops for size in sizes}
        self.work = Workload(
            num_layers=data.lm.geometry.num_layers,
            layers_run=data.used_layers()[-1] + 1,
            d_model=pl_module.d_model,
            sae_flops=flops,
            context=data.packing.context,
            tokens=data.num_steps * data.tokens_per_step,
            calibration_tokens=self.measurement.tokens,
            calibration_passes=self.measurement.passes,
        )
        self.cost = run_cost(
            self.work,
            num_groups=self.plan.partition.num_groups,
            num_saes=len(self.plan.saes),
            d_sae=pl_module.d_sae,
            distances=needs_distances(self.plan.partition.rule),
        )
