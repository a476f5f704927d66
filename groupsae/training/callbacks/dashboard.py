"""Figures of a run while it happens: in the run folder and on W&B."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from groupsae.files.atomic import atomic_write
from groupsae.grouping.rules import RULES, curve
from groupsae.reporting.figures import amad_curve, distance_heatmap, linkage_tree
from groupsae.training.callbacks.grouping import GroupLayers


def save_figures(folder: Path, figures: dict[str, Figure], loggers: list[Any]) -> None:
    """Write figures as png into `folder`, and to W&B if it is among the loggers."""
    for name, figure in figures.items():
        with atomic_write(folder / f"{name}.png") as handle:
            figure.savefig(handle, format="png")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(
                "figures", [str(folder / f"{n}.png") for n in figures], caption=list(figures)
            )


class Dashboard(L.Callback):
    """Draws the groups once they are chosen, and logs them.

    Args:
        folder: run folder.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw distances and AMAD."""
        if trainer.global_rank != 0:
            return
        grouping = next(c for c in trainer.callbacks if isinstance(c, GroupLayers))  # type: ignore[attr-defined]
        plan, cost, measured = grouping.plan, grouping.cost, grouping.measurement
        assert plan is not None
        assert cost is not None
        assert measured is not None
        part = plan.partition
        n = part.num_layers
        grouped = measured.distances[:n, :n]
        rule = part.rule if part.rule in RULES else "complete"
        save_figures(
            self.folder / "figures",
            {
                "distances": distance_heatmap(measured.distances, plan.saes),
                "amad": amad_curve(
                    curve(grouped, rule),
                    part,
                    getattr(grouping.choice, "theta", None),
                ),
            }
            | ({"dendrogram": linkage_tree(grouped, part.groups)} if n > 1 else {}),
            trainer.loggers,
        )
        facts = {
            "groups/num_groups": part.num_groups,
            "groups/amad": part.amad,
            "groups/max_diameter": part.max_diameter,
            "groups/saving": cost.saving,
        }
        for logger in trainer.loggers:
            logger.log_metrics(facts, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.log_table(
                    "groups",
                    columns=["group", "layers", "diameter"],
                    data=[
                        [name, str(group), diameter]
                        for name, group, diameter in zip(
                            plan.names, plan.saes, [*part.diameters, 0.0], strict=False
                        )
                    ],
                )
