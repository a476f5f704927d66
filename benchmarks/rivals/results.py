"""What was measured, kept as numbers, and the page and figure that are made of it."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rivals.activations import SHAPES
from benchmarks.rivals.contenders import BASE, OURS
from benchmarks.rivals.summary import Row, side_by_side, summed_up
from groupsae.reporting.style import COLOURS, PER_LAYER, legend_below

RESULTS = Path(__file__).parent.parent / "results"
TOKENS = 2048  # of a step of the whole loop
INTRODUCTION = """# Beside other libraries

Each library trains with its own trainer and its own optimiser settings, in an environment and a
process of its own, on the same activations with the same shapes and k, in float32. The processes
take turns in blocks of steps, A B C B C A C A B. Milliseconds and tokens per second are medians
over rounds of the median step. Speeds are medians of ratios that are taken round by round, with
their range in brackets, so they need not be the ratio of two figures of the table. No latent is
dead yet, so no library pays for AuxK; the language model has random weights. groupsae sets its
allocator to keep what is freed (which is what *tuned malloc* gives to all); *plain malloc* is
groupsae without that.

Six SAEs, one for each layer, are the same work for all. *2 SAEs of 3 layers each* are less: what
grouping saves, not what a faster program does. SAELens decodes densely, as it does by default: its
`use_sparse_activations=True` fails in the training step on a CPU (`aten::view` on SparseCPU).
"""


def titles() -> dict[str, str]:
    """Return part -> what it measures."""
    steps = {
        name: f"A training step: d_model {d}, d_sae {n}, k {k}, batch {b}"
        for name, (d, n, k, b) in SHAPES.items()
    }
    loop = "The whole loop: 6-layer GPT-NeoX, d_model 512, 8 x 256 tokens; d_sae 4096, k 32"
    return {**steps, "loop": loop}


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """Return part -> what was measured last, as the driver left it in a folder."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def write_page(measured: dict[str, dict[str, Any]], folder: Path = RESULTS) -> None:
    """Write `rivals.md` and `rivals.png`.

    Args:
        measured: part -> `blocks` (contender -> seconds, [round][step]) and `conditions` (a line).
        folder: where to.
    """
    rows = {part: summed_up(each["blocks"], BASE) for part, each in measured.items()}
    page = [INTRODUCTION]
    present = {
        shape: title
        for shape, title in titles().items()
        if {shape, f"{shape}-tuned"} & measured.keys()
    }
    for shape, title in present.items():
        unit = "tokens/s" if shape == "loop" else "ms"
        plain, tuned = rows.get(shape, {}), rows.get(f"{shape}-tuned", {})
        page += [f"## {title}\n", side_by_side(plain, tuned, unit, TOKENS) + "\n"]
    page += ["![Bars of the tables above](rivals.png)\n", "## Conditions\n"]
    page += [f"- {part}: {each['conditions']}" for part, each in measured.items()]
    folder.mkdir(exist_ok=True)
    (folder / "rivals.md").write_text("\n".join(page) + "\n")
    figure = Figure(figsize=(9, 1 + 2.3 * len(present)), layout="constrained", dpi=150)
    panels = figure.subplots(len(present), squeeze=False)[:, 0]
    for axes, (shape, title) in zip(panels, present.items(), strict=True):
        _bars(axes, rows.get(shape, {}), rows.get(f"{shape}-tuned", {}), shape == "loop")
        axes.set_title(title, fontsize=9, loc="left")
    legend_below(figure)
    figure.savefig(folder / "rivals.png")


def _bars(axes: Axes, plain: dict[str, Row], tuned: dict[str, Row], rate: bool) -> None:
    """Draw a bar for each contender and setting: ms of a step, or tokens per second."""
    names = list({**plain, **tuned})
    for label, rows, offset, alpha in (
        ("malloc as it is", plain, -0.2, 1.0),
        ("tuned malloc for all", tuned, 0.2, 0.45),
    ):
        for i, name in enumerate(names):
            if name not in rows:
                continue
            value = 1000 * TOKENS / rows[name].ms if rate else rows[name].ms
            colour = COLOURS[0] if name.startswith(OURS) else PER_LAYER
            shown = label if not axes.get_legend_handles_labels()[1].count(label) else None
            axes.barh(i + offset, value, 0.38, color=colour, alpha=alpha, label=shown)
            axes.text(value, i + offset, f" {value:,.0f}", va="center", fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("tokens per second" if rate else "ms per step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
