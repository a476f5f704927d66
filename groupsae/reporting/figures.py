"""The figures of a run, as matplotlib figures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from groupsae.grouping.partition import Distances, Partition
from groupsae.reporting.style import COLOURS, layer_ticks, legend_below, new_axes

MOST_LABELS = 15  # lines with a legend; more would need more room than the curves


def distance_heatmap(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> Figure:
    """Return the angular distances of all layer pairs with the groups outlined.

    Args:
        distances: fractions of pi, [L, L].
        groups: contiguous groups of layers.
    """
    layers = len(distances)
    figure, axes = new_axes(5.6, 4.8)
    axes.spines[:].set_visible(True)
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
    ticks = layer_ticks(range(layers))
    axes.set(
        xlabel="layer",
        ylabel="layer",
        xticks=ticks,
        yticks=ticks,
        title="Residual streams of the layers, and their groups",
    )
    return figure


def linkage_tree(distances: Distances, groups: Sequence[Sequence[int]]) -> Figure:
    """Return the dendrogram of complete linkage, its leaves in the colours of the groups.

    Args:
        distances: fractions of pi, [n, n], of at least two layers.
        groups: groups of these layers; they need not come from this linkage.
    """
    layers = len(distances)
    figure, axes = new_axes(max(5.6, min(12.0, 1.6 + 0.3 * layers)))
    tree = linkage(squareform(distances, checks=False), method="complete")
    first = list(range(layers))  # the lowest layer of each cluster: it stands on the left
    for i, (a, b) in enumerate(tree[:, :2].astype(int)):
        if first[a] > first[b]:
            tree[i, :2] = b, a
        first.append(min(first[a], first[b]))
    drawn = dendrogram(tree, no_plot=True)
    for x, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        axes.plot(x, heights, color="0.35", lw=1.4)
    colours = {layer: COLOURS[i % len(COLOURS)] for i, g in enumerate(groups) for layer in g}
    places = [10 * i + 5 for i in range(layers)]
    for place, leaf in zip(places, drawn["leaves"], strict=True):
        axes.plot(place, 0, "o", ms=7, color=colours.get(leaf, "0.6"), clip_on=False, zorder=3)
    axes.set_xticks(places, [str(leaf) for leaf in drawn["leaves"]])
    axes.tick_params(axis="x", length=0, pad=7, labelsize=10 if layers <= 24 else 6.5)
    axes.spines["bottom"].set_visible(False)
    axes.set(
        xlabel="layer (colour: its group)",
        ylabel="largest angle at the merge (fractions of π)",
        ylim=(0, None),
        title="Complete linkage of the layers",
    )
    return figure


def amad_curve(curve: Sequence[Partition], chosen: Partition, theta: float | None) -> Figure:
    """Return AMAD and the largest diameter against the number of groups.

    Args:
        curve: the rule's partition for every G from 1.
        chosen: the partition of this run.
        theta: the threshold that chose it, if one did.
    """
    figure, axes = new_axes(5.6, 4.0)
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
    figure = Figure(figsize=(9.0, 4.2), layout="constrained", dpi=150)
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
                clip_on=False,  # a curve at zero is seen on top of the axis
                zorder=3,
                label=label_of(name.rsplit("/", 1)[1]),
            )
        axes.set(xlabel="tokens per SAE (millions)", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.locator_params(nbins=6)
    drawn = {line.get_label() for line in left.lines}
    if len(drawn) <= MOST_LABELS:
        legend_below(figure, columns=5)
        figure.suptitle("Training")
    else:
        figure.suptitle(f"Training of {len(drawn)} SAEs")
    return figure


def label_of(name: str) -> str:
    """Return `layers 3-5` for `layers.3-5`, `layer 3` for `layers.3`."""
    span = name.removeprefix("layers.").split(".")[0]
    return f"layers {span}" if "-" in span else f"layer {span}"
