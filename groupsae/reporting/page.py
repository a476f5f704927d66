"""Writes the report: one HTML page that needs nothing beside itself, and its figures as PNG."""

import base64
import hashlib
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from groupsae import __version__
from groupsae.reporting.collection import Captioned, run_figures
from groupsae.reporting.formatting import plural
from groupsae.reporting.load import RunFiles, read_run
from groupsae.reporting.sections import run_sections
from groupsae.reporting.seeds import not_alike
from groupsae.reporting.several import compare_runs
from groupsae.runtime.errors import UserError


class Image(NamedTuple):
    """A figure as the page holds it: a data URI, its size in CSS pixels, and its texts."""

    image: str
    width: int
    height: int
    title: str
    caption: str
    wide: bool


def write_report(
    folders: Sequence[Path], output: Path | None = None, say: Callable[[str], None] = print
) -> Path:
    """Write `report.html` and the figures of one or several runs; return the page's path.

    Args:
        folders: of the runs.
        output: where to write; None: `<run>/report` for one run, and for several a folder named
            by them beside the first.
        say: told what the reader must know before believing a comparison.

    Raises:
        UserError: a folder is no run, a file in it is damaged, a run is named twice, or the
            place cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError("no run is named: run=outputs/tiny/amad-0.2/<...>[,<another run>].")
    resolved = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"run={runs[i].folder} is named twice: name each run once.")
    warning = not_alike(runs)
    if warning is not None:
        say(f"warning: {warning}")
    place = output if output is not None else default_output(resolved)
    try:
        place.mkdir(parents=True, exist_ok=True)
        html = _render(runs, place)
        beside = place / "report.html.tmp"
        beside.write_text(html, encoding="utf-8")
        beside.replace(place / "report.html")
    except OSError as error:
        raise UserError(
            f"cannot write to {place}: {error.strerror or error}. Set output=<folder> to a place "
            "that can be written."
        ) from error
    return place / "report.html"


def default_output(folders: Sequence[Path]) -> Path:
    """Return `<run>/report`, or `report-<hash of the runs>` beside the first of several runs."""
    if len(folders) == 1:
        return folders[0] / "report"
    key = hashlib.sha256("\n".join(map(str, folders)).encode()).hexdigest()[:8]
    return folders[0].parent / f"report-{key}"


def _render(runs: Sequence[RunFiles], place: Path) -> str:
    several = len(runs) > 1
    names = short_names(runs)
    shown = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        folder = place / name.replace("/", "-") if several else place
        images = [(f.section, _save(f, folder)) for f in run_figures(run)]
        shown.append({"id": f"run-{i + 1}", "name": name, "sections": run_sections(run, images)})
    comparison: dict[str, Any] | None = None
    if several:
        verdict, tables, figures = compare_runs(runs, names)
        comparison = {
            "verdict": verdict,
            "tables": tables,
            "figures": [_save(figure, place) for figure in figures],
        }
    environment = Environment(
        loader=PackageLoader("groupsae.reporting"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        title=f"{plural(len(runs), 'run')} compared" if several else runs[0].name,
        subtitle=None if several else _subtitle(runs[0]),
        comparison=comparison,
        runs=shown,
        version=__version__,
    )


def short_names(runs: Sequence[RunFiles]) -> list[str]:
    """Return the runs' folders without the part that all share."""
    folders = [str(run.folder.resolve()) for run in runs]
    if len(folders) == 1:
        return [runs[0].name]
    common = os.path.commonpath(folders)
    return [os.path.relpath(folder, common) for folder in folders]


def _subtitle(run: RunFiles) -> str:
    tokens = (run.summary or {}).get("tokens")
    parts = [run.model, f"{run.plan.get('num_layers', '?')} layers"]
    parts += [f"{tokens:,} tokens per SAE"] if tokens else []
    parts += [f"seed {run.seed}"] if run.seed is not None else []
    return ", ".join(parts)


def _save(figure: Captioned, folder: Path) -> Image:
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
        figure.wide,
    )


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG, the same bytes for the same figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
