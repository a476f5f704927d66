"""Exports a run: SAEs for another library, pages about its latents, a repository of the Hub."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig
from rich.progress import Progress
from rich.table import Column, Table

from groupsae.app.run_folder import finished_run
from groupsae.files.atomic import check_free
from groupsae.interop.formats import FORMATS as LIBRARIES
from groupsae.interop.library import Library
from groupsae.interpretation.exporting import (
    PAGE_FORMATS,
    check_interpreted,
    export_pages,
)
from groupsae.interpretation.features import Names
from groupsae.interpretation.files import Interpretation
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.suite.card import dataset_of, figures_of_run, files_of_run, publish
from groupsae.suite.exporting import Written, export_suite, holds_only
from groupsae.suite.hub import check_name, repository
from groupsae.suite.suite import Suite, load_suite


class Format(NamedTuple):
    """One value of `format=`.

    Attributes:
        recognises: whether a folder at the top of an export has this format.
        check: raises UserError if the command cannot be carried out, before SAEs are read.
        write: writes into the target, prints what was written, and returns the folders' names.
        library: that of the SAEs; None for pages.
    """

    recognises: Callable[[Path], bool]
    check: Callable[[DictConfig, Path], object]
    write: Callable[[DictConfig, Path, Suite, Path], list[str]]
    library: Library | None


def export(cfg: DictConfig, run: Path) -> None:
    """Write, compare and upload as the command asks; print the results.

    Raises:
        UserError: the command asks for what cannot be done, the format cannot hold the SAEs, or
            they cannot be read, written or uploaded.
    """
    on_hub = repository(run) is not None
    form = None if cfg.format is None else _format_named(str(cfg.format))
    _check(cfg, run, on_hub)
    name = str(cfg.format) if cfg.grouping is None else f"{cfg.format}-{cfg.grouping}"
    target = Path(str(cfg.output)) if cfg.output is not None else run / "export" / name
    if form is not None:
        form.check(cfg, run)
        source, ours = None if on_hub else run, holds_only(form.recognises)
        check_free(target, overwrite=cfg.overwrite, ours=ours, source=source)
    suite = load_suite(str(run), cfg.grouping)
    folders: list[str] = []
    files: dict[str, Path | bytes] = {}
    if form is not None:
        folders = form.write(cfg, run, suite, target)
        screen().print(f"Export: {target}", soft_wrap=True)
        files = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
    if cfg.hub is None:
        return
    files |= files_of_run(run) if form is None else figures_of_run(run)
    try:
        address = publish(
            cfg.hub,
            suite,
            files,
            run=run,
            private=cfg.private,
            overwrite=cfg.overwrite,
            grouping=cfg.grouping,
            library=None if form is None else form.library,
            folders=folders,
        )
    except UserError as error:
        again = f" The folders are in {target}: to do all of it again, add overwrite=true."
        raise UserError(f"{error}{again if form else ''}") from error
    print(f"Uploaded {len(files) + 1} files: {address}")


def _check(cfg: DictConfig, run: Path, on_hub: bool) -> None:
    formats = f"format={', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}"
    if cfg.format is None and cfg.hub is None:
        raise UserError(f"nothing to do: give {formats}, or hub=<owner/name>, or both.")
    if cfg.format is None and cfg.output is not None:
        raise UserError(
            f"output={cfg.output} is where format=... writes, and no format is given: leave it "
            f"out, or give {formats}."
        )
    if on_hub and cfg.format is None:
        raise UserError(f"run={run} is on the Hub already: give format=... to convert it.")
    if on_hub and cfg.output is None:
        raise UserError(f"run={run} is no folder here: name one to write to, output=<folder>.")
    if not on_hub and not (run / "summary.json").exists():
        finished_run(run, trusted=True)  # builds nothing: raises an error if something is missing
    if cfg.hub is not None:
        check_name(str(cfg.hub), f"hub={cfg.hub}")


def _format_named(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format is {name!r}; use {', '.join(FORMATS)}.")
    return FORMATS[name]


# ---- SAEs for another library ---------------------------------------------------------------


def _write_saes(
    library: Library, cfg: DictConfig, _run: Path, suite: Suite, target: Path
) -> list[str]:
    written = export_suite(suite, library, target, overwrite=cfg.overwrite)
    _show_saes(written)
    return [each.folder for each in written]


def _show_saes(written: Sequence[Written]) -> None:
    table = Table("folder", "SAE", "largest difference", "ties")
    for each in written:
        ties = f"{each.ties} rows" if each.ties else ""
        table.add_row(each.folder, each.group, f"{each.difference:.1e}", ties)
    console = screen()
    console.print(table)
    console.print(
        "Read back and compared: the difference is a share of the largest output; in tied rows "
        "rounding decides between latents."
    )


# ---- pages about latents --------------------------------------------------------------------


def _check_pages(cfg: DictConfig, run: Path) -> None:
    """Raise UserError if pages of a run cannot be made, or not from this command."""
    if cfg.hub is not None:
        raise UserError(
            f"format={cfg.format} writes pages about latents, which hub=... does not upload: "
            "leave hub out here, and upload the SAEs by another command."
        )
    if repository(run) is not None:
        raise UserError(
            f"run={run} is on the Hub, and format={cfg.format} is made of what the text showed "
            "about the latents, which is in the run's folder only: give that."
        )
    Names(**cfg.neuronpedia)
    Interpretation.of(run / "interpretation")


def _write_pages(name: str, cfg: DictConfig, run: Path, suite: Suite, target: Path) -> list[str]:
    found = Interpretation.of(run / "interpretation")
    check_interpreted(suite, found, cfg.grouping)
    names, dataset = Names(**cfg.neuronpedia), dataset_of(run) or ""
    table = Table(Column("folder", overflow="fold"), "SAE", "active", "silent", "explained")
    pages = export_pages(
        suite, found, PAGE_FORMATS[name], names, dataset, target, overwrite=cfg.overwrite
    )
    console, folders = screen(), []
    with Progress(transient=True, console=console) as progress:
        for folder, group, *counts in progress.track(pages, total=len(suite.layers)):
            table.add_row(folder, group, *(f"{count:,}" for count in counts))
            folders.append(folder)
    console.print(table)
    return folders


FORMATS = {
    **{
        name: Format(
            library.recognises, lambda _cfg, _run: None, partial(_write_saes, library), library
        )
        for name, library in LIBRARIES.items()
    },
    **{
        name: Format(form.recognises, _check_pages, partial(_write_pages, name), None)
        for name, form in PAGE_FORMATS.items()
    },
}
