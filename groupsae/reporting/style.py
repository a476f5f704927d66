"""The style of all figures: sizes, colours, and how a value with its interval is drawn."""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from groupsae.reporting.load import Interval

# Okabe and Ito: told apart with every kind of colour blindness; black is kept for the baseline
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", ":")  # once all colours are used
RULE_COLOURS = {"complete": 0, "minmax": 2, "even": 4, "published": 3}  # indices into COLOURS
MARKERS = {"complete": "o", "minmax": "^", "even": "s", "published": "v"}
LINES = {"complete": "-", "minmax": "-.", "even": "--", "published": ":"}
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
        found = dict(zip(labels, handles, strict=True)) | found  # the first one stands
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=min(columns, len(found)),
            frameon=False,
            fontsize=8.5,
        )


def bars(values: Sequence[Interval]) -> list[list[float]]:
    """Return the [2, n] distances below and above the values, as `errorbar` wants them."""
    lows, highs = zip(*(v.bounds for v in values), strict=True)
    return [
        [max(0.0, v.value - low) for v, low in zip(values, lows, strict=True)],
        [max(0.0, high - v.value) for v, high in zip(values, highs, strict=True)],
    ]


def line_with_band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Interval],
    *,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Draw a line through the values with their intervals as a band (one value: as a bar)."""
    points = [v.value for v in values]
    if len(x) == 1:
        axes.errorbar(
            x, points, bars(values), fmt=marker, color=colour, label=label, capsize=3, lw=1.4
        )
        return
    axes.plot(x, points, marker=marker, ms=5, lw=1.6, color=colour, label=label)
    lows, highs = zip(*(v.bounds for v in values), strict=True)
    axes.fill_between(x, lows, highs, color=colour, alpha=0.14, lw=0)


def layer_ticks(layers: Sequence[int]) -> list[int]:
    """Return at most 16 of the layers, evenly spaced: labels that do not touch."""
    step = -(-len(layers) // 16)
    return list(layers)[:: max(1, step)]
