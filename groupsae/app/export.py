"""Exports a run: SAEs for another library, pages about its latents, a repository of the Hub."""

from pathlib import Path
from types import ModuleType

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
from groupsae.runtime.errors import UserError, check_choice
from groupsae.runtime.output import screen
from groupsae.suite.card import dataset_of, figures_of_run, files_of_run, publish
from groupsae.suite.exporting import export_suite, holds_only
from groupsae.suite.hub import check_name, repository
from groupsae.suite.suite import Suite, load_suite

FORMATS = (*LIBRARIES, *PAGE_FORMATS)


def export(cfg: DictConfig, run: Path) -> None:
    """Write, compare and upload as the command asks; print the results.

    Raises:
        UserError: the command asks for what cannot be done, the format cannot hold the SAEs, or
            they cannot be read, written or uploaded.
    """
    on_hub = repository(run) is not None
    if cfg.format is not None:
        check_choice("format", cfg.format, FORMATS)
    library, pages = LIBRARIES.get(cfg.format), PAGE_FORMATS.get(cfg.format)
    form: Library | ModuleType | None = library or pages
    _check(cfg, run, on_hub)
    name = str(cfg.format) if cfg.grouping is None else f"{cfg.format}-{cfg.grouping}"
    target = Path(str(cfg.output)) if cfg.output is not None else run / "export" / name
    if pages is not None:
        _check_pages(cfg, run)
    if form is not None:
        source, ours = None if on_hub else run, holds_only(form.recognises)
        check_free(target, overwrite=cfg.overwrite, ours=ours, source=source)
    suite = load_suite(str(run), cfg.grouping)
    folders: list[str] = []
    files: dict[str, Path | bytes] = {}
    if library is not None:
        folders = _write_saes(library, suite, target, cfg.overwrite)
    if pages is not None:
        folders = _write_pages(pages, cfg, run, suite, target)
    if form is not None:
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
            library=library,
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


# ---- SAEs for another library ---------------------------------------------------------------


def _write_saes(library: Library, suite: Suite, target: Path, overwrite: bool) -> list[str]:
    """Write into the target, print what was written, and return the names of the folders."""
    written = export_suite(suite, library, target, overwrite=overwrite)
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
    return [each.folder for each in written]


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


def _write_pages(
    form: ModuleType, cfg: DictConfig, run: Path, suite: Suite, target: Path
) -> list[str]:
    """Write into the target, print what was written, and return the names of the folders."""
    found = Interpretation.of(run / "interpretation")
    check_interpreted(suite, found, cfg.grouping)
    names, dataset = Names(**cfg.neuronpedia), dataset_of(run) or ""
    table = Table(Column("folder", overflow="fold"), "SAE", "active", "silent", "explained")
    pages = export_pages(suite, found, form, names, dataset, target, overwrite=cfg.overwrite)
    console, folders = screen(), []
    with Progress(transient=True, console=console) as progress:
        for folder, group, *counts in progress.track(pages, total=len(suite.layers)):
            table.add_row(folder, group, *(f"{count:,}" for count in counts))
            folders.append(folder)
    console.print(table)
    return folders
