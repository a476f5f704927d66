"""Writes the report: one HTML page, with its figures as PNG and its tables as csv."""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from groupsae import __version__
from groupsae.reporting import runs as several
from groupsae.reporting import tables
from groupsae.reporting.figures import Captioned, run_figures
from groupsae.reporting.formatting import (
    METRICS,
    UNITS,
    duration,
    number,
    percent,
    plural,
    spans,
)
from groupsae.reporting.load import Interval, RunFiles, interval, read_run
from groupsae.reporting.tables import Table
from groupsae.runtime.errors import UserError


class Tile(NamedTuple):
    """One figure that sums something up: what it is, its value, and a note."""

    label: str
    value: str
    note: str


class Image(NamedTuple):
    """A figure as the page holds it: a data URI, its size in CSS pixels, and its texts."""

    image: str
    width: int
    height: int
    title: str
    caption: str
    wide: bool


@dataclass
class Section:
    """A part of the page.

    Attributes:
        id: for links.
        title: heading.
        headline: one sentence.
        tiles: the main values.
        notes: sentences.
        caveats: what the numbers do not show.
        figures: images.
        tables: below the figures.
        facts: names and values.
        text: preformatted, shown on demand.
    """

    id: str
    title: str
    headline: str = ""
    tiles: list[Tile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    figures: list[Image] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not any((self.headline, self.figures, self.tables, self.facts, self.text))


def write_report(
    folders: Sequence[Path], output: Path | None = None, log: Callable[[str], None] = print
) -> Path:
    """Write `report.html` with the figures and tables of runs; return the page's path.

    Args:
        folders: of the runs.
        output: where to write; None: `<run>/report` for one run, and for several a folder named
            after them next to the first.
        log: prints a warning where the runs cannot be compared.

    Raises:
        UserError: a folder is no run, a file in it is damaged, a run is named twice, or the
            place cannot be written.
    """
    if not folders:
        raise UserError("no run is named: run=outputs/tiny/amad-0.2/<...>[,<another run>].")
    runs = [read_run(folder) for folder in folders]
    resolved = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"run={runs[i].folder} is named twice: name each run once.")
    if warning := several.not_alike(runs):
        log(f"warning: {warning}")
    place = output if output is not None else _default_output(resolved)
    try:
        place.mkdir(parents=True, exist_ok=True)
        page = place / "report.html"
        page.write_text(_render(runs, place), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to {place}: {error.strerror or error}. Set output=<folder> to a place "
            "that can be written."
        ) from error
    return page


def _default_output(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / "report"
    key = hashlib.sha256("\n".join(map(str, folders)).encode()).hexdigest()[:8]
    return folders[0].parent / f"report-{key}"


def _render(runs: Sequence[RunFiles], place: Path) -> str:
    environment = Environment(
        loader=PackageLoader("groupsae.reporting"), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("report.html.jinja")
    if len(runs) == 1:
        (run,) = runs
        tokens = run.summary.get("tokens")
        parts = [run.model, f"{run.plan['num_layers']} layers"]
        parts += [f"{tokens:,} tokens per SAE"] if tokens else []
        parts += [f"seed {run.seed}"] if run.seed is not None else []
        return template.render(
            title=run.name,
            subtitle=", ".join(parts),
            comparison=None,
            runs=[{"id": "run-1", "name": run.name, "sections": run_sections(run, place)}],
            version=__version__,
        )
    names = short_names(runs)
    return template.render(
        title=f"{plural(len(runs), 'run')} compared",
        subtitle=None,
        comparison=comparison(runs, names, place),
        runs=[
            {
                "id": f"run-{i}",
                "name": name,
                "sections": run_sections(run, place / name.replace("/", "-")),
            }
            for i, (run, name) in enumerate(zip(runs, names, strict=True), 1)
        ],
        version=__version__,
    )


def short_names(runs: Sequence[RunFiles]) -> list[str]:
    """Return the folders of several runs without the part that all share."""
    folders = [str(run.folder.resolve()) for run in runs]
    common = os.path.commonpath(folders)
    return [os.path.relpath(folder, common) for folder in folders]


def comparison(runs: Sequence[RunFiles], names: Sequence[str], place: Path) -> Section:
    """Return the section about several runs together; write its figures and tables."""
    found = several.families(runs)
    caveats = [
        "Ranges over seeds show how much training varies; intervals of single runs show how much "
        "the held-out text matters. Runs of different configurations were not paired."
    ]
    if warning := several.not_alike(runs):
        caveats.insert(0, f"{warning} The marked rows are unlike the first.")
    return Section(
        "comparison",
        "Side by side",
        f"{plural(len(runs), 'run')} of {plural(len(found), 'configuration')}.",
        caveats=caveats,
        tables=_save_tables(
            place,
            several.runs_table(runs, names),
            several.seeds_table(found),
            several.seeds_baselines_table(found),
        ),
        figures=[_save_figure(figure, place) for figure in several.runs_figures(found)],
    )


def run_sections(run: RunFiles, place: Path) -> list[Section]:
    """Return the sections of one run that have something in them; write figures and tables."""
    images: dict[str, list[Image]] = {}
    for figure in run_figures(run):
        images.setdefault(figure.section, []).append(_save_figure(figure, place))
    unevaluated = [] if run.evaluation else list(run.summary.get("groups", {}))
    contents = {
        "groups": ("Layers and groups", [tables.groups_table(run)]),
        "quality": (
            "What sharing costs",
            [tables.baselines_table(run), tables.groupings_table(run), tables.together_table(run)],
        ),
        "layers": (
            "Layer by layer",
            [
                tables.layers_table(run),
                tables.scale_table(run),
                tables.variants_table(run),
                tables.similarity_table(run),
            ],
        ),
        "latents": ("Latents", [tables.saes_table(run)]),
        "training": ("Training", [tables.trained_table(run, unevaluated)]),
        "cost": (
            "Cost ledger",
            [tables.parts_table(run), tables.saved_table(run), tables.sharing_table(run)],
        ),
    }
    sections = [
        summary(run),
        *(
            Section(id, title, figures=images.get(id, []), tables=_save_tables(place, *found))
            for id, (title, found) in contents.items()
        ),
        Section(
            "provenance",
            "Configuration and provenance",
            facts=provenance(run),
            text=run.config_text,
        ),
    ]
    return [section for section in sections if not section.empty]


def summary(run: RunFiles) -> Section:
    """Return what a run shows: its main values, and a few sentences."""
    lost = (run.chosen or {}).get("against_per_layer") or {}
    num_saes, num_layers, saving = len(run.saes), sum(map(len, run.saes.values())), run.saving
    section = Section(
        "summary", "Summary", f"{plural(num_saes, 'SAE')} for {plural(num_layers, 'layer')}"
    )
    if not run.summary and not run.evaluation:
        section.headline = "This run is not finished: it has no SAEs yet"
    elif saving is not None and num_saes < num_layers:
        section.headline += (
            f" save {percent(saving)} of the FLOPs of one SAE per layer"
            if saving >= 0
            else f" cost {percent(-saving)} more FLOPs than one SAE per layer"
        )
        if fvu := interval(lost.get("fvu")):
            section.headline += f"; the difference in FVU is {_signed(fvu)}{_ends(fvu)}"
        section.tiles.append(Tile("FLOPs saved", percent(saving), "of one SAE per layer"))
    section.headline += "."
    if run.groups and not run.imported:
        amad = "no AMAD" if run.amad is None else f"AMAD {number(run.amad, 3)}"
        section.tiles.insert(0, Tile("groups", str(len(run.groups)), amad))
    means = run.grouped_layers or {"fvu": run.summary.get("fvu")}
    for metric, name in METRICS.items():
        if value := interval(means.get(metric)):
            note = _ends(value).strip(" ()") or "held-out text"
            section.tiles.append(Tile(f"{name}{UNITS[metric]}", number(value.value, 4), note))
        if value := interval(lost.get(metric)):
            label = f"{name}{UNITS[metric]} lost against one SAE per layer"
            note = _ends(value).strip(" ()")
            section.tiles.append(Tile(label, _signed(value), note))
    section.notes = _notes(run)
    section.caveats = _caveats(run)
    return section


def _signed(value: Interval) -> str:
    return ("+" if value.value > 0 else "") + number(value.value, 4)


def _ends(value: Interval) -> str:
    return "" if value.low is None else f" ({number(value.low)} to {number(value.high)})"


def _notes(run: RunFiles) -> list[str]:
    """Return how the groups came about, and which commands would show more."""
    notes, chosen = [], run.chosen
    if run.imported:
        notes.append(
            f"The SAEs were trained elsewhere and imported from {run.imported}; the angles "
            "between their layers are not known."
        )
    elif run.groups:
        by_amad = run.theta is not None and (chosen is None or chosen.get("chosen_by"))
        last = {
            "own": " The last layer has an SAE of its own.",
            "skip": " The last layer has no SAE.",
        }
        notes.append(
            (f"AMAD below θ = {run.theta:g} chose " if by_amad else "The run has ")
            + f"{plural(len(run.groups), 'group')} of layers ({spans(run.groups)})."
            + last.get(str(run.plan.get("last_layer")), "")
        )
    if run.saving is not None and run.saving < 0:
        notes.append("At this budget measuring the distances costs more than sharing saves.")
    if run.summary and chosen is None:
        notes.append(
            "The effect of the SAEs on the language model was not measured yet: "
            f"python -m groupsae.evaluate {quote(f'run={run.folder}')}"
        )
    if chosen is not None and interval(run.evaluation["ce"]) is None:
        notes.append("The language model predicts no next token, so there is no cross-entropy.")
    if chosen is not None and not run.imported:
        if run.per_layer is None:
            notes.append(
                "The cost of sharing is not known, because one SAE per layer was not trained: "
                "groups=all trains every number of groups and the baselines."
            )
        elif chosen["kind"] == "groups" and not any(
            "even" in (g.get("rules") or []) for g in run.groupings if g["kind"] == "groups"
        ):
            notes.append(
                "Evenly spaced groups were not trained: groups.rules=[complete,even] trains them."
            )
    return notes


def _caveats(run: RunFiles) -> list[str]:
    """Return what the numbers do not show."""
    caveats, e = [], run.evaluation
    if e:
        caveats.append(
            f"Measured on {e['tokens']:,} held-out tokens, {plural(e['sequences'], 'sequence')} "
            f"from {plural(e['documents'], 'document')}, by {e['model']}. Intervals are "
            f"{percent(e['bootstrap']['level'], 0)} bootstrap intervals over these documents: "
            "they show how much the text matters, not how much another seed would."
        )
    if not run.imported:
        seed = "" if run.seed is None else f" (seed {run.seed})"
        tokens = run.summary.get("tokens")
        budget = f", {tokens / 1e6:g} million tokens per SAE" if tokens else ""
        caveats.append(
            f"This is one training run{seed}{budget}. Several seeds and a larger model are needed "
            "before a small difference means anything in general."
        )
    return caveats


def provenance(run: RunFiles) -> list[tuple[str, str]]:
    """Return where the run and its values come from."""
    summary, measured, e = run.summary, run.measured, run.evaluation
    special = {True: "left out of all averages", False: "counted as any other", None: None}
    bootstrap = e.get("bootstrap")

    def written(values: Any, key: str, form: str) -> str | None:
        return form.format(values[key]) if values.get(key) else None

    facts = [
        ("run folder", run.folder),
        ("imported from", run.imported)
        if run.imported
        else ("command", " ".join(["python -m groupsae.train", *run.overrides])),
        ("model", run.model),
        ("revision", measured.get("revision") or e.get("revision")),
        ("weights", measured.get("weights")),
        ("text", measured.get("text")),
        ("distances from", written(measured, "tokens", "{:,} calibration tokens")),
        ("context", written(measured, "context", "{:,} tokens")),
        ("centring", measured.get("centring")),
        ("training tokens per SAE", written(summary, "tokens", "{:,}")),
        (
            "training time",
            duration(summary["seconds_training"]) if summary.get("seconds_training") else None,
        ),
        ("speed", written(summary, "tokens_per_second", "{:,.0f} tokens/s")),
        ("peak memory", written(summary, "peak_memory_gb", "{:.1f} GB")),
        ("held-out tokens", written(e, "tokens", "{:,}")),
        ("special tokens", special.get(e.get("exclude_special_tokens"))),
        ("first positions left out", e.get("skip_positions") or None),
        ("norms left out", written(e, "max_norm_ratio", "above {:g} medians")),
        (
            "intervals",
            f"{percent(bootstrap['level'], 0)}, {bootstrap['resamples']:,} bootstrap resamples of "
            f"{e['documents']:,} documents, seed {bootstrap['seed']}"
            if bootstrap
            else None,
        ),
        ("groupsae", summary.get("groupsae") or e.get("groupsae")),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _save_figure(figure: Captioned, folder: Path) -> Image:
    """Write the figure as a PNG and return it for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    data = png(figure.figure)
    (folder / f"{figure.name}.png").write_bytes(data)
    width, height = figure.figure.get_size_inches()
    return Image(
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        round(96 * width),
        round(96 * height),
        figure.title,
        figure.caption,
        wide=width > 6.5,
    )


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG, the same bytes for the same figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _save_tables(folder: Path, *found: Table | None) -> list[Table]:
    """Write the tables that exist as csv and return them for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [table for table in found if table is not None]
    for table in kept:
        table.frame.to_csv(folder / f"{table.name}.csv", index=False)
    return kept
