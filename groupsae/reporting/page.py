"""Writes the report: one HTML page, with its figures as PNG and its tables as csv next to it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from groupsae import __version__
from groupsae.reporting import downstream, tables
from groupsae.reporting import runs as several
from groupsae.reporting.downstream import DOWNSTREAM_TABLES
from groupsae.reporting.figures import Captioned, run_figures
from groupsae.reporting.formatting import NONE, duration, number, percent, plural, spans
from groupsae.reporting.load import RunFiles, read_run, value_of
from groupsae.reporting.tables import Table
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError


class Tile(NamedTuple):
    """One figure that sums something up: its label, its value, and a note."""

    label: str
    value: str
    note: str


@dataclass
class Section:
    """A part of the page; empty parts are left out."""

    id: str
    title: str
    headline: str = ""
    tiles: list[Tile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    figures: list[Captioned] = field(default_factory=list)
    tables: list[Table | None] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    text: str = ""


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write `report.html` with the figures and tables of runs; return the page's path.

    Args:
        folders: the run folders.
        output: folder to write to; None: `<run>/report` for one run, and for several a folder next
            to the first, named after them.

    Raises:
        UserError: a folder is no run, a file in it is damaged, a run is named twice, or the
            place cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    resolved = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"run={runs[i].folder} is named twice: name each run once.")
    names, comparison = [runs[0].name], None
    place = output or resolved[0] / "report"
    if len(runs) > 1:
        key = hashlib.sha256("\n".join(map(str, resolved)).encode()).hexdigest()[:8]
        place = output or resolved[0].parent / f"report-{key}"
    sections = [run_sections(run, place) for run in runs]
    if len(runs) > 1:
        common = os.path.commonpath(resolved)
        names = [os.path.relpath(folder, common) for folder in resolved]
        comparison = compare(runs, names)
        if warning := several.not_alike(runs):
            print(f"warning: {warning}")
    page = place / "report.html"
    environment = Environment(
        loader=PackageLoader("groupsae.reporting"), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("report.html.jinja").render(
        title=f"{plural(len(runs), 'run')} compared" if comparison else names[0],
        subtitle="" if comparison else _subtitle(runs[0]),
        comparison=comparison,
        runs=list(zip(names, sections, strict=True)),
        version=__version__,
    )
    try:
        for name, found in zip(names, sections, strict=True):
            _save(found, place / name.replace("/", "-") if comparison else place)
        _save([comparison] if comparison else [], place)
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to {place}: {error.strerror or error}. Set output=<folder> to a place "
            "that can be written."
        ) from error
    return page


def _save(sections: Sequence[Section], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for figure in section.figures:
            (folder / f"{figure.name}.png").write_bytes(figure.png)
        for table in filter(None, section.tables):
            table.frame.to_csv(folder / f"{table.name}.csv", index=False)


def _subtitle(run: RunFiles) -> str:
    tokens = run.summary.get("tokens")
    parts = [run.model, f"{run.plan['num_layers']} layers"]
    parts += [f"{tokens:,} tokens per SAE"] if tokens else []
    parts += [f"seed {run.seed}"] if run.seed is not None else []
    return ", ".join(parts)


def compare(runs: Sequence[RunFiles], names: Sequence[str]) -> Section:
    """Return the section about several runs together."""
    found, warning = several.families(runs), several.not_alike(runs)
    caveats = [f"{warning} The marked rows are unlike the first."] if warning else []
    caveats.append(
        "Ranges over seeds show how much training varies; intervals of single runs show how much "
        "the held-out text matters. Runs of different configurations were not paired."
    )
    return Section(
        "comparison",
        "Side by side",
        f"{plural(len(runs), 'run')} of {plural(len(found), 'configuration')}.",
        caveats=caveats,
        tables=[
            several.runs_table(runs, names),
            several.seeds_baselines_table(found),
            several.seeds_table(found),
        ],
        figures=list(several.runs_figures(found)),
    )


def run_sections(run: RunFiles, place: Path) -> list[Section]:
    """Return the sections of one run that have something in them; `place` is the page's folder."""
    figures, latents = list(run_figures(run)), run.folder / "interpretation" / "index.html"
    page = quote(os.path.relpath(latents.resolve(), place.resolve()))
    extreme = [tables.extreme_latents_table(run, page, best=best) for best in (True, False)]
    contents: dict[str, tuple[str, list[Table | None]]] = {
        "groups": (
            "Layers and groups",
            [tables.groups_table(run, others=not run.evaluation), tables.shares_table(run)],
        ),
        "quality": ("What sharing costs", [build(run) for build in tables.QUALITY_TABLES]),
        "layers": ("Layer by layer", [build(run) for build in tables.LAYER_TABLES]),
        "downstream": (
            "What the model can still do",
            [
                downstream.lost_table(run),
                *(
                    build(run)
                    for part in run.downstream
                    for build in DOWNSTREAM_TABLES.get(part, ())
                ),
                downstream.circuit_latents_table(run, page),
            ],
        ),
        "latents": ("Latents", [tables.latents_table(run)]),
        "inside": (
            "Inside the latents",
            [*(build(run) for build in tables.EXPLAINED_TABLES), *extreme],
        ),
        "training": ("Training", []),
        "cost": ("Cost ledger", [build(run) for build in tables.COST_TABLES]),
    }
    sections = [summary(run)]
    for id, (title, found) in contents.items():
        drawn = [figure for figure in figures if figure.section == id]
        if drawn or any(found):
            sections.append(Section(id, title, figures=drawn, tables=found))
    title = "Configuration and provenance"
    sections.append(Section("provenance", title, facts=provenance(run), text=run.config_text))
    return sections


def summary(run: RunFiles) -> Section:
    """Return the summary of a run: its main values, and a few sentences."""
    num_saes, num_layers, saving = len(run.saes), sum(map(len, run.saes.values())), run.saving
    headline, tiles = f"{plural(num_saes, 'SAE')} for {plural(num_layers, 'layer')}", []
    if run.groups and not run.imported:
        amad = "no AMAD" if run.amad is None else f"AMAD {number(run.amad, 3)}"
        tiles.append(Tile("groups", str(len(run.groups)), amad))
    if not run.summary and not run.evaluation:
        headline = "This run is not finished: it has no SAEs yet"
    elif saving is not None and num_saes < num_layers:
        headline += (
            f" save {percent(saving)} of the FLOPs of one SAE per layer"
            if saving >= 0
            else f" cost {percent(-saving)} more FLOPs than one SAE per layer"
        )
        tiles.append(Tile("FLOPs saved", percent(saving), "of one SAE per layer"))
    table, row = tables.groupings_table(run), 0  # the chosen grouping
    if table is None and (table := tables.groups_table(run)) is not None:
        row = len(table.frame) - 1  # the mean over layers
    for name in ("fvu", "fvu_lost", "delta_ce", "delta_ce_lost"):
        if table is not None and name in table.columns and table.cell(row, name).value != NONE:
            value, note, *_ = table.cell(row, name)
            label = tables.HEADINGS[name] + " against one SAE per layer" * name.endswith("_lost")
            tiles.append(Tile(label, value, note))
            if name == "fvu_lost":
                headline += f"; FVU lost: {value}{f' ({note})' if note else ''}"
    return Section(
        "summary", "Summary", f"{headline}.", tiles, notes=_notes(run), caveats=_caveats(run)
    )


def _notes(run: RunFiles) -> list[str]:
    """Return how the groups came about, and which commands would show more."""
    notes, chosen = [], run.chosen
    if run.imported:
        notes.append(
            f"The SAEs were trained elsewhere and imported from {run.imported}; the angles "
            "between their layers are not known."
        )
    else:
        by_amad = run.theta is not None and (chosen is None or chosen["chosen_by"])
        last = {"own": " The last layer has its own SAE.", "skip": " The last layer has no SAE."}
        notes.append(
            (f"AMAD below θ = {run.theta:g} chose " if by_amad else "The run has ")
            + f"{plural(len(run.groups), 'group')} of layers ({spans(run.groups)})."
            + last.get(run.plan["last_layer"], "")
        )
    if (run.saving or 0) < 0:
        notes.append("At this budget measuring the distances costs more than sharing saves.")
    if run.summary and chosen is None:
        notes.append(
            "The effect of the SAEs on the language model was not measured yet: "
            + command("evaluate", run=run.folder)
        )
    if chosen is not None and value_of(run.evaluation.get("ce")) is None:
        notes.append("The language model predicts no next token: its sentence embeddings count.")
    if chosen is not None and not run.imported:
        even = any("even" in g["rules"] for g in run.groupings if g["kind"] == "groups")
        if run.per_layer is None:
            notes.append(
                "The cost of sharing is not known, because one SAE per layer was not trained: "
                "groups=all trains every number of groups and the baselines."
            )
        elif chosen["kind"] == "groups" and not even:
            notes.append(
                "Evenly spaced groups were not trained: groups.rules=[complete,even] trains them."
            )
    return notes


def _caveats(run: RunFiles) -> list[str]:
    """Return the caveats about the numbers."""
    caveats, e = [], run.evaluation
    if misled := run.advice:
        caveats.append(misled)
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


def provenance(run: RunFiles) -> dict[str, str]:
    """Return the origin of the run and its values."""
    trained, measured, e = run.summary, run.measured, run.evaluation
    seconds = trained.get("seconds_training")
    special = {True: "left out of all averages", False: "counted as any other"}

    def written(form: str, value: Any) -> str | None:
        return form.format(value) if value else None

    facts = {
        "run folder": run.folder,
        "imported from": run.imported,
        "command": None if run.imported else command("train", *run.overrides),
        "model": run.model,
        "revision": measured.get("revision") or e.get("revision"),
        "weights": measured.get("weights"),
        "text": measured.get("text"),
        "distances from": written("{:,} calibration tokens", measured.get("tokens")),
        "context": written("{:,} tokens", measured.get("context")),
        "centring": measured.get("centring"),
        "training tokens per SAE": written("{:,}", trained.get("tokens")),
        "training time": duration(seconds) if seconds else None,
        "speed": written("{:,.0f} tokens/s", trained.get("tokens_per_second")),
        "peak memory": written("{:.1f} GB", trained.get("peak_memory_gb")),
        "held-out tokens": written("{:,}", e.get("tokens")),
        "special tokens": special[e["exclude_special_tokens"]] if e else None,
        "first positions left out": e.get("skip_positions"),
        "norms left out": written("above {:g} medians", e.get("max_norm_ratio")),
        "intervals": written(
            "{0[level]:.0%}, {0[resamples]:,} bootstrap resamples of documents, seed {0[seed]}",
            e.get("bootstrap"),
        ),
        "groupsae": trained.get("groupsae") or e.get("groupsae"),
    }
    return {name: str(value) for name, value in facts.items() if value}
