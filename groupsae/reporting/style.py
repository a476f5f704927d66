"""The style of all figures: sizes, colours, and how a value with its interval is drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito: distinct with every kind of colour blindness; black is kept for the baseline
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", ":")  # once all colours are used
# indices into COLOURS
RULE_COLOURS = {"complete": 0, "minmax": 2, "even": 4, "published": 3, "variance": 6}
MARKERS = {"complete": "o", "minmax": "^", "even": "s", "published": "v", "variance": "p"}
LINES: dict[str, Any] = {
    "complete": "-",
    "minmax": "-.",
    "even": "--",
    "published": ":",
    "variance": (0, (5, 1, 1, 1, 1, 1)),
}
PER_LAYER = "#000000"
SMALLER = COLOURS[5]


def new_axes(width: float = 5.6, height: float = 4.0) -> tuple[Figure, Axes]:
    """Return a figure (inches) with one pair of axes, without the two borders nobody reads."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(figure: Figure, columns: int = 3) -> None:
    """Put one legend under all axes, where it can cover nothing."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found  # the first one is kept
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=min(columns, len(found)),
            frameon=False,
            fontsize=8.5,
        )


def bars(y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the [2, n] distances below and above the values, as `errorbar` wants them."""
    return np.clip([y - low, high - y], 0, None)


def line_with_band(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Draw a line through the values with their intervals as a band (one value: as a bar)."""
    look: dict[str, Any] = {"marker": marker, "color": colour, "label": label}
    if len(x) == 1:
        axes.errorbar(x, y, bars(y, low, high), ls="", capsize=3, lw=1.4, **look)
    else:
        axes.plot(x, y, ms=5, lw=1.6, **look)
        axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)


def layer_ticks(layers: Sequence[int]) -> list[int]:
    """Return at most 16 of the layers, evenly spaced: labels that do not touch."""
    step = -(-len(layers) // 16)
    return list(layers)[:: max(1, step)]
