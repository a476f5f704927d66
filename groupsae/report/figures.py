"""The figures of a run, as matplotlib figures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from groupsae.grouping.partition import Partition

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots()


def distance_heatmap(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> Figure:
    """Return the angular distances of all layer pairs with the groups outlined.

    Args:
        distances: fractions of pi, [L, L].
        groups: contiguous groups of layers.
    """
    layers = len(distances)
    figure, axes = _axes(5.6, 4.8)
    image = axes.imshow(distances, cmap="viridis", vmin=0)
    figure.colorbar(image, label="mean angular distance (fractions of π)")
    for group in groups:
        corner, size = (group[0] - 0.5, group[0] - 0.5), len(group)
        axes.add_patch(
            Rectangle(corner, size, size, fill=False, lw=2.2, ec="#D55E00", clip_on=False)
        )
    if layers <= 16:
        for (i, j), value in np.ndenumerate(distances):
            if i != j:
                axes.text(
                    j,
                    i,
                    f"{value:.2f}".lstrip("0"),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if value < 0.6 * distances.max() else "black",
                )
    ticks = range(0, layers, max(1, layers // 16))
    axes.set(
        xlabel="layer",
        ylabel="layer",
        xticks=ticks,
        yticks=ticks,
        title="Residual streams of the layers, and their groups",
    )
    return figure


def amad_curve(curve: Sequence[Partition], chosen: Partition, theta: float | None) -> Figure:
    """Return AMAD and the largest diameter against the number of groups.

    Args:
        curve: the rule's partition for every G from 1.
        chosen: the partition of this run.
        theta: the threshold that chose it, if one did.
    """
    figure, axes = _axes(5.6, 4.0)
    counts = [p.num_groups for p in curve]
    axes.plot(counts, [p.amad for p in curve], "o-", color=COLOURS[0], label="AMAD")
    axes.plot(
        counts,
        [p.max_diameter for p in curve],
        "--",
        color=COLOURS[4],
        lw=1,
        label="largest diameter",
    )
    axes.plot(
        counts,
        [p.size_weighted_amad for p in curve],
        ":",
        color=COLOURS[2],
        lw=1.4,
        label="size-weighted AMAD",
    )
    if theta is not None:
        axes.axhline(theta, color="0.4", lw=1)
        axes.text(counts[-1], theta, f"θ = {theta:g}", ha="right", va="bottom", color="0.3")
    axes.plot(
        [chosen.num_groups],
        [chosen.amad],
        "o",
        ms=13,
        mfc="none",
        mec=COLOURS[1],
        mew=2,
        label=f"this run: G = {chosen.num_groups}",
    )
    axes.set(
        xlabel="number of groups G",
        ylabel="fractions of π",
        ylim=(0, None),
        title="How close the layers of a group are",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def training_curves(
    rows: Sequence[tuple[int, str, float]], tokens_per_step: int, num_steps: int
) -> Figure:
    """Return held-out FVU per group and dead latents per group against tokens.

    Args:
        rows: (step, metric, value) of `metrics.csv`.
        tokens_per_step: turns steps into tokens.
        num_steps: of the run; the evaluation after the last step is logged one step later.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for axes, stage, metric, label in (
        (left, "val", "fvu", "held-out FVU, mean over the group's layers"),
        (right, "train", "dead", "dead latents (share)"),
    ):
        prefix = f"{stage}/{metric}/layers."
        names = list(dict.fromkeys(name for _, name, _ in rows if name.startswith(prefix)))
        for i, name in enumerate(names):
            points = [(step, value) for step, n, value in rows if n == name]
            axes.plot(
                [min(s + 1, num_steps) * tokens_per_step / 1e6 for s, _ in points],
                [v for _, v in points],
                color=COLOURS[i % len(COLOURS)],
                ls=("-", "--", ":")[i // len(COLOURS) % 3],
                marker="." if stage == "val" else None,
                label=_label(name.rsplit("/", 1)[1]),
            )
        axes.set(xlabel="tokens per SAE (millions)", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.locator_params(nbins=6)
        if names and stage == "val":
            axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.suptitle("Training")
    return figure


def _label(name: str) -> str:
    """Return `layers 3-5` for `layers.3-5`, `layer 3` for `layers.3`."""
    span = name.removeprefix("layers.")
    return f"layers {span}" if "-" in span else f"layer {span}"
