"""Exports the SAEs of a run: folders of another library, a repository of the Hub, or both."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from groupsae.app.run_folder import finished_run
from groupsae.files.atomic import check_free
from groupsae.interop.formats import format_named
from groupsae.runtime.errors import UserError
from groupsae.runtime.output import screen
from groupsae.suite.card import figures_of_run, files_of_run, publish
from groupsae.suite.exporting import Written, export_suite, holds_only
from groupsae.suite.hub import check_name, repository
from groupsae.suite.suite import load_suite


def export(cfg: DictConfig, run: Path) -> None:
    """Write, compare and upload as the command asks; print the results.

    Raises:
        UserError: the command asks for what cannot be done, the format cannot hold the SAEs, or
            they cannot be read, written or uploaded.
    """
    on_hub = repository(run) is not None
    _check(cfg, run, on_hub)
    name = str(cfg.format) if cfg.grouping is None else f"{cfg.format}-{cfg.grouping}"
    target = Path(str(cfg.output)) if cfg.output is not None else run / "export" / name
    library = None if cfg.format is None else format_named(str(cfg.format))
    if library is not None:
        source = None if on_hub else run
        check_free(target, overwrite=cfg.overwrite, ours=holds_only(library), source=source)
    suite = load_suite(str(run), cfg.grouping)
    written: list[Written] = []
    files: dict[str, Path | bytes] = {}
    if library is not None:
        written = export_suite(suite, library, target, overwrite=cfg.overwrite)
        _show(written, target)
        files = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
    if cfg.hub is None:
        return
    files |= files_of_run(run) if library is None else figures_of_run(run)
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
            folders=[each.folder for each in written],
        )
    except UserError as error:
        again = f" The folders are in {target}: to do all of it again, add overwrite=true."
        raise UserError(f"{error}{again if library else ''}") from error
    print(f"Uploaded {len(files) + 1} files: {address}")


def _check(cfg: DictConfig, run: Path, on_hub: bool) -> None:
    formats = "format=saelens, sparsify or dictionary_learning"
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


def _show(written: Sequence[Written], target: Path) -> None:
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
    console.print(f"Export: {target}", soft_wrap=True)
