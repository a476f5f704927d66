"""Figures of a run while it happens: in the run folder and on W&B."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib.figure import Figure

from groupsae.files.atomic import atomic_write
from groupsae.reporting.figures import amad_curve, curve_of, distance_heatmap, linkage_tree
from groupsae.training.callbacks.grouping import GroupLayers


def save_figures(folder: Path, figures: dict[str, Figure], loggers: Sequence[Logger]) -> None:
    """Write figures as png into `folder`, and to W&B if it is among the loggers."""
    files = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        with atomic_write(files[name]) as handle:
            figure.savefig(handle, format="png")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("figures", [str(f) for f in files.values()], caption=list(files))


class Dashboard(L.Callback):
    """Draws the groups once they are chosen, and logs them."""

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the distances and the choice among partitions; log the groups."""
        if not trainer.is_global_zero:
            return
        grouping = next(c for c in trainer.callbacks if isinstance(c, GroupLayers))  # type: ignore[attr-defined]
        plan, distances = grouping.plan, grouping.measurement.distances
        part = plan.partition
        grouped = distances[: part.num_layers, : part.num_layers]
        figures = {}
        if plan.num_layers > 1:
            figures["distances"] = distance_heatmap(distances, plan.saes)
        if part.num_layers > 1:
            theta = getattr(grouping.choice, "theta", None)
            measured, n, other = grouping.measurement, part.num_layers, None
            if measured.other_distances is not None:
                others = measured.other_distances, measured.other_cosines
                other = (measured.other_centring == "mean", curve_of(*others, n, part.rule))
            own = curve_of(distances, measured.cosines, n, part.rule)
            figures["amad"] = amad_curve(own, part, theta, other)
            figures["dendrogram"] = linkage_tree(grouped, part.groups)
        save_figures(self.folder / "figures", figures, trainer.loggers)
        facts = {
            "groups/num_groups": part.num_groups,
            "groups/amad": part.amad,
            "groups/max_diameter": part.max_diameter,
            "groups/saving": grouping.cost.saving,
        }
        columns = ["group", "layers", "diameter"]
        diameters = [*part.diameters, 0.0]  # of the last layer's own SAE
        rows = [list(row) for row in zip(plan.names, map(str, plan.saes), diameters, strict=False)]
        for logger in trainer.loggers:
            logger.log_metrics(facts, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.log_table("groups", columns=columns, data=rows)
