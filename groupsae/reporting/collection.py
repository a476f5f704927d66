"""Every figure of a run with its caption, in the order of the page."""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from groupsae.grouping.partition import build_partition
from groupsae.grouping.rules import RULES, curve
from groupsae.reporting.figures import amad_curve, distance_heatmap, linkage_tree, training_curves
from groupsae.reporting.formatting import METRICS, NAMES
from groupsae.reporting.latents import density, layer_profiles
from groupsae.reporting.load import RunFiles
from groupsae.reporting.per_layer import layer_bars, similarity
from groupsae.reporting.quality import against_amad, against_cost, against_groups, lost

WHAT = {
    "fvu": "FVU is the share of the variance of the activations that the reconstruction loses",
    "delta_ce": "ΔCE is what the cross-entropy of the language model rises by with one layer's "
    "activations replaced by the reconstruction",
}


class Captioned(NamedTuple):
    """A figure of the page.

    Attributes:
        name: of its PNG, without the ending.
        section: of the page: groups, quality, layers, latents or training.
        figure: the figure.
        title: short, for readers who cannot see it.
        caption: what one sees.
    """

    name: str
    section: str
    figure: Figure
    title: str
    caption: str

    @property
    def wide(self) -> bool:
        """Return whether the figure needs the whole width of the page."""
        return bool(self.figure.get_size_inches()[0] > 6.5)


def evaluation_figures(run: RunFiles) -> dict[str, Figure]:
    """Return name -> figure of all that an evaluation adds to a run; none without one."""
    found = [*quality_figures(run), *layer_figures(run), *latent_figures(run)]
    return {each.name: each.figure for each in found}


def run_figures(run: RunFiles) -> list[Captioned]:
    """Return every figure that the files of a run allow."""
    return [
        *group_figures(run),
        *quality_figures(run),
        *layer_figures(run),
        *latent_figures(run),
        *training_figures(run),
    ]


def group_figures(run: RunFiles) -> list[Captioned]:
    """Return the distances, their dendrogram and AMAD."""
    if run.distances is None or not run.groups:
        return []
    last = run.plan.get("last_layer")
    own = [[len(run.distances) - 1]] if last == "own" else []
    n = sum(map(len, run.groups))
    grouped = run.distances[:n, :n]
    found = [
        Captioned(
            "distances",
            "groups",
            distance_heatmap(run.distances, [*run.groups, *own]),
            "Heat map of the angular distances of all layer pairs, groups outlined",
            "Mean angle between the residual streams of two layers. Orange: layers that share an "
            "SAE. Dark squares are layers that point the same way.",
        )
    ]
    if n > 1:
        found.append(
            Captioned(
                "dendrogram",
                "groups",
                linkage_tree(grouped, run.groups),
                "Dendrogram of complete linkage",
                "Where complete linkage joins layers: the height is the largest angle inside the "
                "joined group. The colours are the groups of this run"
                + (
                    ", which come from this tree."
                    if run.plan.get("rule") == "complete"
                    else f", made by the rule {run.plan.get('rule')}."
                ),
            )
        )
    rule = run.plan.get("rule")
    rule = rule if rule in RULES else "complete"
    chosen = build_partition(grouped, run.groups, rule)
    threshold = "" if run.theta is None else ", the first below θ"
    found.append(
        Captioned(
            "amad",
            "groups",
            amad_curve(curve(grouped, rule), chosen, run.theta),
            "AMAD against the number of groups",
            f"AMAD is the mean over groups of their largest angle. Ringed: the number of groups "
            f"of this run{threshold}. More groups are closer, and cost more.",
        )
    )
    return found


def quality_figures(run: RunFiles) -> list[Captioned]:
    """Return quality against G, AMAD and cost, where several groupings were evaluated."""
    if len(run.groupings) < 2:
        return []
    band = "Bands and bars: confidence intervals. Mean over the grouped layers."
    kinds: tuple[tuple[str, Callable[[RunFiles, str], Figure], str], ...] = (
        ("groups", against_groups, "Lower is better; further right costs more."),
        ("lost", lost, "Paired over the same text, so that only the sharing is left."),
        ("amad", against_amad, "What the distances alone foretell of the quality."),
        ("cost", against_cost, "Towards the lower left: better and cheaper."),
    )
    axes = {"groups": "the number of groups", "amad": "AMAD", "cost": "relative cost"}
    found = []
    for kind, draw, remark in kinds:
        if kind == "lost" and run.per_layer is None:
            continue
        for metric in METRICS:
            name = NAMES[metric]
            title = (
                f"{name} lost against one SAE per layer"
                if kind == "lost"
                else f"{name} against {axes[kind]}"
            )
            what = f"{WHAT[metric]}. " if kind == "groups" else ""
            found.append(
                Captioned(
                    f"{metric}_{kind}",
                    "quality",
                    draw(run, metric),
                    title,
                    f"{title}, one line per rule. {remark} {what}{band}",
                )
            )
    return found


def layer_figures(run: RunFiles) -> list[Captioned]:
    """Return bars per layer, and how far latents are found again."""
    found = []
    for metric in METRICS:
        figure = layer_bars(run, metric)
        if figure is not None:
            found.append(
                Captioned(
                    f"{metric}_layers",
                    "layers",
                    figure,
                    f"{NAMES[metric]} of every layer",
                    f"{NAMES[metric]} of every layer with the SAE of its group; one colour is one "
                    "SAE, whiskers are confidence intervals."
                    + (" Marks: the baselines." if len(run.groupings) > 1 else ""),
                )
            )
    figure = similarity(run)
    if figure is not None:
        found.append(
            Captioned(
                "similarity",
                "layers",
                figure,
                "MMCS and MMCO per layer",
                "How well the latents of a layer's own SAE are found again in the SAE of its "
                "group: by direction (MMCS) and by the tokens on which they fire (MMCO). 1 is a "
                "perfect match.",
            )
        )
    return found


def latent_figures(run: RunFiles) -> list[Captioned]:
    """Return layer profiles and densities."""
    found = []
    figure = layer_profiles(run)
    if figure is not None:
        found.append(
            Captioned(
                "profiles",
                "latents",
                figure,
                "Share of each latent's firings per layer, for every shared SAE",
                "Each row is a latent, sorted by the mean layer on which it fires. Yellow: it "
                "fires on that layer only; an even colour: on all layers of the group alike.",
            )
        )
    figure = density(run)
    if figure is not None:
        found.append(
            Captioned(
                "density",
                "latents",
                figure,
                "Histogram of latent densities",
                "Latents to the right of the dotted line fire on more than a tenth of the tokens "
                "(dense); those that never fired are counted in the legend.",
            )
        )
    return found


def training_figures(run: RunFiles) -> list[Captioned]:
    """Return the training curves of the SAEs that the report is about."""
    names = {f"{kind}/{name}" for name in run.saes for kind in ("val/fvu", "train/dead")}
    rows = [row for row in run.metrics if row[1] in names]
    tokens, steps = (run.summary or {}).get("tokens"), (run.summary or {}).get("steps")
    if not steps:
        context = run.setting("stream.context", None)
        blocks = run.setting("stream.blocks_per_step", None)
        if not isinstance(context, int) or not isinstance(blocks, int):
            return []
        per_step, steps = context * blocks, max((row[0] for row in rows), default=0) + 1
    else:
        per_step = tokens // steps if tokens else 1
    if not rows:
        return []
    return [
        Captioned(
            "training",
            "training",
            training_curves(rows, per_step, steps),
            "Held-out FVU and dead latents against training tokens",
            "Left: FVU on held-out text during training. Right: latents that have not fired for "
            "long; they come back to life where the curve falls.",
        )
    ]
