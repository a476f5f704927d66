"""Shows a run while it happens: groups on screen, figures in the run folder and on W&B."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from groupsae.cost.model import RunCost
from groupsae.files.atomic import atomic_write
from groupsae.grouping.plan import GroupPlan
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
    """Prints and draws the groups once they are chosen.

    Args:
        grouping: the callback that chose them.
        folder: run folder.
        say: prints a line.
        show_plan: prints the groups and what they save.
    """

    def __init__(
        self,
        *,
        grouping: GroupLayers,
        folder: Path,
        say: Callable[[str], None],
        show_plan: Callable[[GroupPlan, RunCost], None],
    ) -> None:
        self.grouping, self.folder = grouping, folder
        self.say, self.show_plan = say, show_plan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the groups and draw distances and AMAD."""
        if trainer.global_rank != 0:
            return
        plan, cost, measured = (self.grouping.plan, self.grouping.cost, self.grouping.measurement)
        assert plan is not None
        assert cost is not None
        assert measured is not None
        self.show_plan(plan, cost)
        epochs = trainer.datamodule.epochs()  # type: ignore[attr-defined]
        if epochs > 1:
            self.say(
                f"The budget is {epochs:.1f} times the training text: it is read "
                "again, newly shuffled, in each epoch."
            )
        part = plan.partition
        n = part.num_layers
        grouped = measured.distances[:n, :n]
        rule = part.rule if part.rule in RULES else "complete"
        wanted, got = self.grouping.tokens, measured.provenance["tokens"]
        if got < wanted // 2:
            self.say(
                f"Distances and norms come from {got:,} tokens, all that the calibration split "
                f"holds, instead of {wanted:,}: raise stream.calibration_fraction or "
                "stream.max_tokens for more."
            )
        save_figures(
            self.folder / "figures",
            {
                "distances": distance_heatmap(measured.distances, plan.saes),
                "amad": amad_curve(
                    curve(grouped, rule),
                    part,
                    getattr(self.grouping.choice, "theta", None),
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
