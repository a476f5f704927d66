"""Figures with one mark per layer: FVU, effect on the model, similarity to per-layer SAEs."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from groupsae.reporting.formatting import NAMES
from groupsae.reporting.load import Interval, RunFiles, interval
from groupsae.reporting.quality import UNITS
from groupsae.reporting.style import (
    COLOURS,
    PER_LAYER,
    SMALLER,
    bars,
    layer_ticks,
    legend_below,
    new_axes,
)


def layer_bars(run: RunFiles, metric: str) -> Figure | None:
    """Return a metric per layer as bars in the colours of the groups, baselines as marks.

    Returns:
        None where the run has no such figures.
    """
    if run.chosen is None:
        return None
    own = per_layer_values(run, run.chosen, metric)
    if not own:
        return None
    figure, axes = new_axes(max(5.6, min(12.0, 1.6 + 0.34 * len(own))))
    colours = colour_of_layer(run)
    axes.bar(
        list(own),
        [v.value for v in own.values()],
        color=[colours.get(layer, "0.6") for layer in own],
        width=0.78,
        yerr=bars(list(own.values())),
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.25"},
    )
    even = run.baseline("even")
    if even is not None and even is run.chosen:
        even = None
    others = (
        (run.per_layer, "one SAE per layer", "_", PER_LAYER, 0.0),
        (even, "evenly spaced", "s", "white", -0.2),
        (run.baseline("smaller"), "smaller SAEs", "D", SMALLER, 0.2),
    )
    for grouping, label, marker, colour, shift in others:
        if grouping is None or grouping is run.chosen:
            continue
        found = per_layer_values(run, grouping, metric)
        axes.plot(
            [layer + shift for layer in found],
            [v.value for v in found.values()],
            marker,
            ms=11 if marker == "_" else 4.5,
            mew=2.2 if marker == "_" else 0.8,
            color=colour,
            mec="black",
            label=label,
            path_effects=[withStroke(linewidth=4, foreground="white")] if marker == "_" else [],
        )
    axes.set(
        xlabel="layer",
        ylabel=UNITS[metric],
        xticks=layer_ticks(list(own)),
        title=f"{NAMES[metric]} of every layer",
    )
    legend_below(figure)
    return figure


def per_layer_values(run: RunFiles, grouping: dict[str, Any], metric: str) -> dict[int, Interval]:
    """Return layer -> value of a metric with the SAE that a grouping gives the layer."""
    found = {}
    for layer, sae in sorted((int(x), s) for x, s in grouping["sae_of_layer"].items()):
        value = interval((run.result(sae, layer) or {}).get(metric))
        if value is not None:
            found[layer] = value
    return found


def colour_of_layer(run: RunFiles) -> dict[int, str]:
    """Return layer -> colour, one for each SAE, neighbours always different."""
    return {
        layer: COLOURS[i % len(COLOURS)]
        for i, layers in enumerate(run.saes.values())
        for layer in layers
    }


def similarity(run: RunFiles) -> Figure | None:
    """Return MMCS and MMCO of each layer's own SAE against the SAE of its group.

    Returns:
        None where no per-layer SAEs were trained beside.
    """
    of_layer = similarities(run)
    if not of_layer:
        return None
    figure, axes = new_axes(max(5.6, min(12.0, 1.6 + 0.34 * len(of_layer))))
    colours = colour_of_layer(run)
    for key, label, marker in (
        ("mmcs", "MMCS: cosine of the decoder directions", "o"),
        ("mmco", "MMCO: overlap of the tokens where they fire", "D"),
    ):
        pairs = [(x, r[key]) for x, r in of_layer.items() if r.get(key) is not None]
        look: dict[str, Any] = {"marker": marker, "ls": "", "ms": 7, "mew": 1.6}
        for x, value in pairs:
            colour = colours.get(x, "0.6")
            face = "white" if marker == "D" else colour
            axes.plot(x, value, mec=colour, mfc=face, **look)
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


def similarities(run: RunFiles) -> dict[int, dict[str, Any]]:
    """Return layer -> MMCS and MMCO of the chosen grouping's SAE, shared SAEs only."""
    if run.chosen is None or run.evaluation is None:
        return {}
    serves = {int(x): s for x, s in run.chosen["sae_of_layer"].items()}
    found = {}
    for row in run.evaluation.get("similarity") or []:
        layer = int(row["layer"])
        if serves.get(layer) == row["sae"] and row["sae"] != row["baseline"]:
            found[layer] = row
    return dict(sorted(found.items()))
