"""The figures of a run: how each is drawn, and all of them with their captions."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, MultipleLocator
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from groupsae.evaluation.latents import layer_profile
from groupsae.grouping.partition import Cosines, Distances, Partition, build_partition
from groupsae.grouping.rules import RULES, curve
from groupsae.reporting.formatting import METRICS, RULE_NAMES, number
from groupsae.reporting.load import RunFiles, value_of
from groupsae.reporting.style import (
    COLOURS,
    DASHES,
    MARKERS,
    PER_LAYER,
    RULE_COLOURS,
    SMALLER,
    bars,
    layer_ticks,
    legend_below,
    line_with_band,
    new_axes,
)
from groupsae.reporting.tables import groupings_table, layers_table, points

MOST_LABELS = 15  # lines with a legend; more would need more room than the curves
PANELS = 4  # in a row
UNITS = {
    "fvu": "FVU (share of variance lost)",
    "delta_ce": "ΔCE (nats per token)",
    "embedding_loss": "1 − cosine of embeddings",
}


@dataclass(frozen=True)
class Captioned:
    """A figure of the page."""

    name: str  # of its PNG, without the ending
    section: str  # of the page: its `id`
    figure: Figure
    caption: str

    @cached_property
    def png(self) -> bytes:
        """The figure as a PNG, the same bytes for the same figure."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    @property
    def uri(self) -> str:
        """The PNG as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = self.figure.get_size_inches()
        return round(96 * width), round(96 * height)


def run_figures(run: RunFiles) -> Iterator[Captioned]:
    """Yield every figure that the files of a run allow, in the order of the page."""
    yield from _group_figures(run)
    yield from evaluation_figures(run)
    yield from downstream_figures(run)
    yield from explained_figures(run)
    yield from _training_figures(run)


# ---- layers and groups --------------------------------------------------------------------------


def _group_figures(run: RunFiles) -> Iterator[Captioned]:
    if run.distances is None or not run.groups or len(run.distances) == 1:
        return
    own = [[len(run.distances) - 1]] if run.plan["last_layer"] == "own" else []
    n, rule, theta = sum(map(len, run.groups)), run.plan["rule"], run.theta
    grouped = run.distances[:n, :n]
    yield Captioned(
        "distances",
        "groups",
        distance_heatmap(run.distances, [*run.groups, *own]),
        "Mean angle between the residual streams of two layers. Orange: layers that share an "
        "SAE. Dark squares are layers that point the same way.",
    )
    if n == 1:
        return
    yield Captioned(
        "dendrogram",
        "groups",
        linkage_tree(grouped, run.groups),
        "Complete linkage of the layers: a merge is as high as the largest angle inside the "
        "merged group. The colours are the groups of this run, which come from "
        + ("this tree." if rule == "complete" else f"the rule {rule}."),
    )
    threshold = "" if theta is None else ", the first below θ"
    centred, other = run.measured.get("centring") == "mean", run.other_distances
    yield Captioned(
        "amad",
        "groups",
        amad_curve(
            curve_of(run.distances, run.cosines, n, rule),
            build_partition(grouped, run.groups, rule),
            theta,
            None if other is None else (not centred, curve_of(other, run.other_cosines, n, rule)),
        ),
        "AMAD, the mean over groups of their largest angle, against the number of groups. Ringed: "
        f"this run{threshold}. More groups are closer, and cost more."
        + (
            ""
            if other is None
            else f" Dash-dotted: with distances that are {'un' * centred}centred, which means with"
            f"{'out' * centred} each layer's mean activation subtracted."
        ),
    )


def distance_heatmap(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> Figure:
    """Return the angular distances of all layer pairs with the groups outlined."""
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
                colour = "white" if value < 0.6 * distances.max() else "black"
                text = f"{value:.2f}".lstrip("0")
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
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
    """Return the dendrogram of complete linkage, its leaves in the colours of the groups."""
    layers = len(distances)
    figure, axes = new_axes(max(5.6, min(12.0, 1.6 + 0.3 * layers)))
    tree = linkage(squareform(distances, checks=False), method="complete")
    first = list(range(layers))  # the lowest layer of each cluster, drawn on the left
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


def curve_of(
    distances: Distances, cosines: Cosines | None, num_layers: int, rule: str
) -> list[Partition]:
    """Return the partitions of the first layers for every G, by complete linkage for no rule."""
    kept = np.s_[:num_layers, :num_layers]
    rule = rule if rule in RULES else "complete"
    return curve(distances[kept], rule, None if cosines is None else cosines[kept])


def amad_curve(
    curve: Sequence[Partition],
    chosen: Partition,
    theta: float | None,
    other: tuple[bool, Sequence[Partition]] | None = None,
) -> Figure:
    """Return AMAD and the largest diameter of the rule's partitions, for every G from 1.

    `other`: whether the other distances are centred, and the partitions that they give.
    """
    figure, axes = new_axes(5.6, 4.0)
    counts = [p.num_groups for p in curve]
    if other is not None:
        centred, partitions = other
        label = f"AMAD, {'un' * (not centred)}centred"
        axes.plot(
            counts, [p.amad for p in partitions], "-.", color=COLOURS[3], lw=1.5, label=label
        )
    for values, look, colour, width, label in (
        ([p.amad for p in curve], "o-", 0, 1.5, "AMAD"),
        ([p.max_diameter for p in curve], "--", 4, 1, "largest diameter"),
        ([p.size_weighted_amad for p in curve], ":", 2, 1.4, "size-weighted AMAD"),
    ):
        axes.plot(counts, values, look, color=COLOURS[colour], lw=width, label=label)
    if theta is not None:
        axes.axhline(theta, color="0.4", lw=1)
        axes.text(counts[-1], theta, f"θ = {theta:g}", ha="right", va="bottom", color="0.3")
    _ring(axes, chosen.num_groups, chosen.amad, f"this run: G = {chosen.num_groups}")
    axes.set(
        xlabel="number of groups G",
        ylabel="fractions of π",
        ylim=(0, None),
        title="How close the layers of a group are",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def _ring(axes: Axes, x: float, y: float, label: str) -> None:
    axes.plot([x], [y], "o", ms=13, mfc="none", mec=COLOURS[1], mew=2, label=label)


# ---- what sharing costs -------------------------------------------------------------------------


# kind -> column of the x axis, its label, title of the figure, remark of its caption
QUALITY = {
    "groups": (
        "num_groups",
        "number of groups G",
        "against G",
        "Lower is better; further right costs more.",
    ),
    "lost": (
        "num_groups",
        "number of groups G",
        "lost by sharing",
        "Against one SAE per layer, paired over the same text: only the sharing is left.",
    ),
    "amad": (
        "amad",
        "AMAD (fractions of π)",
        "against AMAD",
        "How well the distances alone predict the quality.",
    ),
    "cost": (
        "flops",
        "FLOPs relative to one SAE per layer",
        "against cost",
        "Towards the lower left: better and cheaper.",
    ),
}
MEANING = {
    "fvu": "FVU: the share of the variance of the activations that the reconstruction loses.",
    "delta_ce": "ΔCE: the rise of the language model's cross-entropy with the activations of one "
    "layer replaced by the reconstruction.",
    "embedding_loss": "1 − cosine: how far the sentence embeddings move with the activations of "
    "one layer replaced by the reconstruction.",
}


def evaluation_figures(run: RunFiles) -> Iterator[Captioned]:
    """Yield what an evaluation adds to a run; nothing without one."""
    several = len(run.groupings) > 1
    means = run.grouped_layers
    measured = {key: name for key, name in METRICS.items() if value_of(means.get(key)) is not None}
    for kind, (_, _, title, remark) in QUALITY.items() if several else ():
        for metric, name in measured.items() if run.per_layer or kind != "lost" else ():
            yield Captioned(
                f"{metric}_{kind}",
                "quality",
                quality(run, metric, kind),
                f"{name} {title}, mean over the grouped layers. {remark} Bands and bars: "
                f"confidence intervals. {MEANING[metric]}",
            )
    for metric, name in measured.items():
        if figure := layer_bars(run, metric):
            yield Captioned(
                f"{metric}_layers",
                "layers",
                figure,
                f"{name} of every layer with the SAE of its group. One colour is one SAE, "
                f"whiskers are confidence intervals{', marks baselines' if several else ''}.",
            )
    if run.similarity:
        yield Captioned(
            "similarity",
            "layers",
            similarity(run),
            "How well the latents of a layer's own SAE are found again in the SAE of its group: "
            "by direction (MMCS) and by the tokens on which they fire (MMCO). 1: a perfect match.",
        )
    if figure := layer_profiles(run):
        yield Captioned(
            "profiles",
            "latents",
            figure,
            "Share of each latent's firings per layer, for every shared SAE, sorted by the mean "
            "layer. Yellow: it fires on that layer only; an even colour: on all layers alike.",
        )
    if figure := density(run):
        yield Captioned(
            "density",
            "latents",
            figure,
            "How often latents fire. Right of the dotted line: on more than a tenth of the tokens "
            "(dense). Latents that never fired are counted in the legend.",
        )


def quality(run: RunFiles, metric: str, kind: str) -> Figure:
    """Return a metric of all groupings, one line per rule; kind is a key of QUALITY."""
    where, label, title, _ = QUALITY[kind]
    figure, axes = new_axes()
    lost, table = kind == "lost", groupings_table(run)
    assert table is not None
    frame, column = table.frame, metric + "_lost" * lost
    if lost:
        axes.axhline(0, color=PER_LAYER, lw=1, ls="--", label="one SAE per layer")
    _draw_groupings(axes, frame, [g["rules"] for g in run.groupings], where, column)
    chosen = "AMAD's choice" if run.groupings[0]["chosen_by"] else "this run"
    for x, y, *_ in zip(*points(frame[:1], where, column), strict=True):
        _ring(axes, x, y, chosen)
    if kind == "amad" and run.theta is not None:
        axes.axvline(run.theta, color="0.4", lw=1, ls=":", label=f"θ = {run.theta:g}")
    axes.set(
        xlabel=label,
        ylabel=("change of " if lost else "") + UNITS[metric],
        title=f"{METRICS[metric]} {title}",
    )
    if kind == "amad":
        axes.set_xlim(0, None)
    elif kind == "cost":
        axes.xaxis.set_major_formatter("{x:.0%}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure)
    return figure


def _draw_groupings(
    axes: Axes, frame: pd.DataFrame, rules: Sequence[Sequence[str]], where: str, column: str
) -> None:
    """Draw one line per rule, a level for one SAE per layer, and marks for smaller SAEs.

    `rules` are those that gave the grouping of each row of the frame.
    """
    kinds = zip(frame["kind"], rules, strict=True)
    for position, rule in enumerate(
        dict.fromkeys(r for k, rs in kinds if k == "groups" for r in rs)
    ):
        line = points(frame[[rule in each for each in rules]], where, column)
        if len(line[0]):
            colour = COLOURS[RULE_COLOURS.get(rule, position % len(COLOURS))]
            marker, name = MARKERS.get(rule, "o"), RULE_NAMES.get(rule, rule)
            line_with_band(axes, *line, colour=colour, marker=marker, label=name)
    lost = column.endswith("_lost")
    for level in () if lost else points(frame[frame["kind"] == "per_layer"], where, column)[1]:
        axes.axhline(level, color=PER_LAYER, lw=1, ls="--", label="one SAE per layer")
    x, y, low, high = points(frame[frame["kind"] == "smaller"], where, column)
    if len(x):
        axes.errorbar(
            x, y, bars(y, low, high), fmt="D", ms=6, color=SMALLER, ecolor=SMALLER, mec="black",
            mew=0.7, capsize=3, label="smaller SAEs",
        )  # fmt: skip


# ---- layer by layer -----------------------------------------------------------------------------


def layer_bars(run: RunFiles, metric: str) -> Figure | None:
    """Return a metric per layer as bars, baselines as marks; None if there are no values."""
    table = layers_table(run)
    if table is None:
        return None
    numbers = table.frame["layer"].where(table.frame["layer"] != "mean").astype(float)
    x, y, low, high = points(table.frame.assign(layer=numbers), "layer", metric)
    if not len(x):
        return None
    layers = [int(layer) for layer in x]
    figure, axes = new_axes(max(5.6, min(12.0, 1.6 + 0.34 * len(layers))))
    colours = _colour_of_layer(run)
    axes.bar(
        layers,
        y,
        color=[colours.get(layer, "0.6") for layer in layers],
        width=0.78,
        yerr=bars(y, low, high),
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.25"},
    )
    dash: dict[str, Any] = {"marker": "_", "ms": 11, "mew": 2.2, "color": PER_LAYER}
    dash["path_effects"] = [withStroke(linewidth=4, foreground="white")]
    small: dict[str, Any] = {"ms": 4.5, "mew": 0.8}
    marks = {
        "per_layer": ("one SAE per layer", 0.0, dash),
        "even": ("evenly spaced", -0.2, small | {"marker": "s", "color": "white"}),
        "smaller": ("smaller SAEs", 0.2, small | {"marker": "D", "color": SMALLER}),
    }
    for grouping in run.groupings[1:]:
        kind, rules = grouping["kind"], grouping["rules"]
        kind = "even" if kind == "groups" and "even" in rules else kind
        alike = kind == "per_layer" or grouping["num_groups"] == run.groupings[0]["num_groups"]
        if alike and kind != "groups":
            label, shift, look = marks[kind]
            found = run.layer_results(grouping)
            axes.plot(
                [layer + shift for layer in found],
                np.array([value_of(row[metric]) for row in found.values()], dtype=float),
                label=label,
                ls="",
                mec="black",
                **look,
            )
    axes.set(
        xlabel="layer",
        ylabel=UNITS[metric],
        xticks=layer_ticks(layers),
        title=f"{METRICS[metric]} of every layer",
    )
    legend_below(figure)
    return figure


def _colour_of_layer(run: RunFiles) -> dict[int, str]:
    """Return layer -> colour, one for each SAE, neighbours always different."""
    return {
        layer: COLOURS[i % len(COLOURS)]
        for i, layers in enumerate(run.saes.values())
        for layer in layers
    }


def similarity(run: RunFiles) -> Figure:
    """Return MMCS and MMCO of each layer's own SAE against the SAE of its group."""
    of_layer = run.similarity
    figure, axes = new_axes(max(5.6, min(12.0, 1.6 + 0.34 * len(of_layer))))
    colours = _colour_of_layer(run)
    for key, label, marker in (
        ("mmcs", "MMCS: cosine of the decoder directions", "o"),
        ("mmco", "MMCO: overlap of the tokens where they fire", "D"),
    ):
        look: dict[str, Any] = {"marker": marker, "ls": "", "ms": 7, "mew": 1.6}
        for x, row in of_layer.items():
            if row.get(key) is not None:
                colour = colours.get(x, "0.6")
                face = "white" if marker == "D" else colour
                axes.plot(x, row[key], mec=colour, mfc=face, **look)
        axes.plot([], [], mec="0.4", mfc="white" if marker == "D" else "0.4", label=label, **look)
    axes.set(
        xlabel="layer",
        ylabel="mean over the layer's latents",
        ylim=(0, 1),
        xticks=layer_ticks(list(of_layer)),
        title="Latents of the layer's own SAE found again in its group's",
    )
    legend_below(figure, columns=1)
    return figure


# ---- latents ------------------------------------------------------------------------------------


def layer_profiles(run: RunFiles) -> Figure | None:
    """Return an image per shared SAE: the share of each latent's firings in each layer.

    Latents are sorted by their mean layer; those that never fired are left out (paper, figure
    "feature distribution"). None where no SAE is shared, or the counts were not saved.
    """
    panels = [(name, *profile) for name in run.saes if (profile := _profile(run, name))]
    if not panels:
        return None
    figure, grid = _panels(len(panels))
    image = None
    for axes, (name, layers, shares) in zip(grid.flat, panels, strict=False):
        image = axes.imshow(
            shares,
            aspect="auto",
            cmap="viridis",
            norm=PowerNorm(0.5, 0, 1),  # even shares of a large group are small, and must be seen
            interpolation="nearest",
        )
        ticks = layer_ticks(layers)[:: 2 if len(layers) > 8 else 1]
        axes.set_xticks([layers.index(x) for x in ticks], [str(x) for x in ticks])
        axes.set(title=_label(name), xlabel="layer")
        axes.title.set_fontsize(10)
        axes.locator_params(axis="y", nbins=5)
    for axes in grid[:, 0]:
        axes.set_ylabel("latent, by mean layer")
    assert image is not None
    figure.colorbar(image, ax=grid, label="share of the latent's firings", shrink=0.8)
    return figure


def _profile(
    run: RunFiles, name: str
) -> tuple[list[int], Float[np.ndarray, "latent layer"]] | None:
    stored = run.latents(name)
    if stored is None or len(stored["layers"]) < 2:
        return None
    layers = [int(x) for x in stored["layers"]]
    tokens = np.broadcast_to(stored["tokens"].astype(np.int64), len(layers))
    profile = layer_profile(stored["fired"].astype(np.int64), tokens, layers)
    order = np.argsort(profile.mean_layers, kind="stable")
    shares = profile.shares[order[profile.alive[order]]]
    return (layers, shares) if len(shares) else None


def density(run: RunFiles) -> Figure | None:
    """Return the histogram of how often latents fire; None where the run was not evaluated."""
    saes = {s["name"]: s for s in run.evaluation.get("saes", [])}
    found = [(name, saes[name]["density_histogram"]) for name in run.saes if name in saes]
    if not found:
        return None
    figure, axes = new_axes()
    for i, (name, histogram) in enumerate(found):
        counts = np.asarray(histogram["counts"], dtype=np.float64)
        total = max(1.0, counts.sum() + histogram["never"])
        never = f", {histogram['never']} never" if histogram["never"] else ""
        axes.stairs(
            counts / total,
            np.asarray(histogram["edges"], dtype=np.float64),
            color=COLOURS[i % len(COLOURS)],
            ls=DASHES[i // len(COLOURS) % 3],
            lw=1.6,
            label=_label(name) + never,
        )
    axes.axvline(-1, color="0.4", lw=1, ls=":")
    axes.text(-1, 0.99, " dense", transform=axes.get_xaxis_transform(), va="top", color="0.3")
    axes.set(
        xlabel="share of tokens on which a latent fires",
        ylabel="share of the SAE's latents",
        ylim=(0, None),
        title="How often latents fire",
    )
    axes.xaxis.set_major_formatter("$10^{{{x:g}}}$")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    legend_below(figure)
    return figure


# ---- inside the latents -------------------------------------------------------------------------


def downstream_figures(run: RunFiles) -> Iterator[Captioned]:
    """Yield what the model can still do; nothing without circuits."""
    if figure := circuit_curves(run.downstream.get("circuits", {})):
        yield Captioned(
            "circuits",
            "downstream",
            figure,
            "Faithfulness of circuits against their number of latents, means over the tasks that "
            "all groupings have: 1 is the model. Dashed: as many latents drawn at random among "
            "the active ones. With errors kept the full circuit is the model whatever the SAEs; "
            "without them its height is what the SAEs carry of the tasks.",
        )


def circuit_curves(circuits: Mapping[str, Any]) -> Figure | None:
    """Return the curves of faithfulness by grouping, a panel for each way to treat errors."""
    found = pd.DataFrame(circuits.get("curves", []))
    if found.empty:
        return None
    found["ratio"] = found["ratio"].map(value_of)
    names = list(dict.fromkeys(found["grouping"]))[: len(COLOURS) + 1]
    treated = found["errors"].unique()
    figure = Figure(figsize=(4.4 * len(treated), 3.8), layout="constrained", dpi=150)
    every = figure.subplots(1, len(treated), sharey=True, squeeze=False)[0]
    for axes, errors in zip(every, treated, strict=True):
        rows = found[(found["errors"] == errors) & found["grouping"].isin(names)]
        counts = rows.groupby("task")["grouping"].nunique()
        rows = rows[rows["task"].isin(counts.index[counts == len(names)])]
        colours = iter(COLOURS)
        for name in names:
            colour = PER_LAYER if name == "per_layer" else next(colours)
            for kind, dash in (("faithfulness", "-"), ("random", "--")):
                mine = rows[(rows["grouping"] == name) & (rows["kind"] == kind)]
                line = mine.groupby("fraction")[["latents", "ratio"]].mean()
                label = name if kind == "faithfulness" else f"{name}, random"
                if len(line):
                    axes.plot(
                        line["latents"], line["ratio"], dash, color=colour, marker=".", label=label
                    )
        title = "errors kept" if errors == "keep" else "without errors"
        axes.set(xscale="log", xlabel="latents in the circuit", title=title)
        axes.axhline(1, color="0.8", lw=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("faithfulness")
    legend_below(figure)
    return figure


def explained_figures(run: RunFiles) -> Iterator[Captioned]:
    """Yield what an interpretation adds to a run; nothing without one."""
    if (frame := run.explained.get("groupings")) is not None and len(frame) > 1:
        yield Captioned(
            "explained_groups",
            "inside",
            explained_curves(run),
            "How well rules explain the latents, against the number of groups, and the FVU of the "
            "same groupings. Left: with an explanation of its own for each layer; next to it: "
            "with one for all layers of the group. Higher is better explained. Bands: intervals "
            "over latents (F1) and over text (FVU).",
        )
    if figure := transfer_maps(run):
        yield Captioned(
            "transfer",
            "inside",
            figure,
            "Transfer τ of explanations: how well one that is made at a layer (row) holds at "
            "another (column), in units of the latter's own, which has 1; 0: as well as the "
            "explanation of another latent. Mean over latents; last row: made from all layers.",
        )


def explained_curves(run: RunFiles) -> Figure:
    """Return the F1 of explanations, and FVU where the run was evaluated, against G."""
    explained, evaluated = run.explained["groupings"], groupings_table(run)
    rules = [str(names).split(",") for names in explained["rules"].fillna("")]
    panels = [
        (explained, rules, "f1", "F1, an explanation for each layer"),
        (explained, rules, "one_label_f1", "F1, one explanation for all layers"),
    ]
    if evaluated is not None:
        rows = [grouping["rules"] for grouping in run.groupings]
        panels.append((evaluated.frame, rows, "fvu", UNITS["fvu"]))
    figure = Figure(figsize=(4.0 * len(panels), 3.6), layout="constrained", dpi=150)
    for axes, (frame, made_by, column, label) in zip(
        figure.subplots(1, len(panels)), panels, strict=True
    ):
        _draw_groupings(axes, frame, made_by, "num_groups", column)
        axes.set(xlabel="number of groups G", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[1].sharey(figure.axes[0])
    legend_below(figure)
    return figure


def transfer_maps(run: RunFiles) -> Figure | None:
    """Return an image per shared SAE of the run: mean tau(a -> b); None where no SAE is shared."""
    frame = run.explained.get("transfer")
    panels = (
        []
        if frame is None
        else [
            (name, table) for name, table in frame.groupby("sae", sort=False) if name in run.saes
        ]
    )
    if not panels:
        return None
    figure, grid = _panels(len(panels))
    image = None
    for axes, (name, table) in zip(grid.flat, panels, strict=False):
        square = table.pivot(index="made_at", columns="layer", values="tau")
        layers = [int(layer) for layer in square.columns]
        values = square.loc[[*map(str, layers), "all"]].to_numpy(float)
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        ticks = [layers.index(layer) for layer in layer_ticks(layers)]
        axes.set_xticks(ticks, [str(layers[i]) for i in ticks])
        axes.set_yticks([*ticks, len(layers)], [*(str(layers[i]) for i in ticks), "all"])
        if len(layers) <= 8:
            for (i, j), value in np.ndenumerate(values):
                text = "" if np.isnan(value) else number(value, 2).replace("0.", ".")
                colour = "white" if value < 0.6 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
        axes.set(title=_label(name), xlabel="holds at layer")
        axes.title.set_fontsize(10)
    for axes in grid[:, 0]:
        axes.set_ylabel("made at layer")
    assert image is not None
    figure.colorbar(image, ax=grid, label="mean transfer τ", shrink=0.8, extend="both")
    return figure


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """Return a figure with a grid of at least so many axes; the rest of them are hidden."""
    columns = min(PANELS, count)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(max(4.2, 2.35 * columns + 0.9), 3.2 * rows), layout="constrained", dpi=150
    )
    grid: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid


# ---- training -----------------------------------------------------------------------------------


def _training_figures(run: RunFiles) -> Iterator[Captioned]:
    names = {f"{kind}/{name}" for name in run.saes for kind in ("val/fvu", "train/dead")}
    rows = [row for row in run.metrics if row[1] in names]
    steps = run.summary.get("steps")
    if steps:
        per_step = (run.summary.get("tokens") or steps) // steps
    else:  # the run is unfinished
        context, blocks = (run.setting(f"stream.{k}") for k in ("context", "blocks_per_step"))
        per_step = context * blocks if isinstance(context, int) and isinstance(blocks, int) else 0
        steps = max((row[0] for row in rows), default=0) + 1
    if rows and per_step:
        yield Captioned(
            "training",
            "training",
            training_curves(rows, per_step, steps),
            "Left: FVU on held-out text during training. Right: latents that have not fired for "
            "long; they come back to life where the curve falls.",
        )


def training_curves(
    rows: Sequence[tuple[int, str, float]], tokens_per_step: int, num_steps: int
) -> Figure:
    """Return held-out FVU per group and dead latents per group against tokens.

    `rows` are those of `metrics.csv`; the evaluation after the last step is logged one step later.
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
                ls=DASHES[i // len(COLOURS) % 3],
                marker="." if stage == "val" else None,
                clip_on=False,  # a curve at zero is seen on top of the axis
                zorder=3,
                label=_label(name.rsplit("/", 1)[1]),
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


def _label(name: str) -> str:
    """Return `layers 3-5` for `layers.3-5`, `layer 3` for `layers.3`."""
    span = name.removeprefix("layers.").split(".")[0]
    return f"layers {span}" if "-" in span else f"layer {span}"
