"""Write the SAEs of a run as other libraries load them: `python -m groupsae.export run=<folder>`.

With `hub=<owner/name>` they also go to the Hugging Face Hub, in our own format or in another.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from groupsae.app.run_folder import finished_run, one_folder
from groupsae.config.arguments import CONF, check_arguments, plain_folder
from groupsae.runtime.errors import UserError

if TYPE_CHECKING:
    from groupsae.interop.outgoing import Written


def export(cfg: DictConfig) -> None:
    """Write, compare, upload; say what was done.

    Raises:
        UserError: the command asks for what cannot be done, the format cannot hold the SAEs, or
            they cannot be read, written or uploaded.
    """
    run = _run_to_export(cfg)
    # slow imports only after cheap checks
    from groupsae.files.atomic import check_free
    from groupsae.interop.card import card, figures_of_run, files_of_run, of_groupsae
    from groupsae.interop.formats import format_named
    from groupsae.interop.outgoing import export_suite, only
    from groupsae.suite.hub import check_name, repository, upload
    from groupsae.suite.suite import load_suite

    chosen = None if cfg.format is None else format_named(cfg.format)
    name = str(cfg.format) if cfg.grouping is None else f"{cfg.format}-{cfg.grouping}"
    target = Path(str(cfg.to)) if cfg.to is not None else run / "export" / name
    if chosen is not None:
        source = run if repository(run) is None else None
        check_free(target, overwrite=cfg.overwrite, ours=only(chosen), source=source)
    if cfg.hub is not None:
        check_name(str(cfg.hub), f"hub={cfg.hub}")
    suite = load_suite(str(run), cfg.grouping)
    files: dict[str, Path | bytes]
    if chosen is None:
        written, files = [], files_of_run(run)
    else:
        written = export_suite(suite, chosen, target, overwrite=cfg.overwrite)
        _show(written, target)
        files = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
        files |= figures_of_run(run)
    if cfg.hub is not None:
        repo, folders = str(cfg.hub), [each.folder for each in written]
        page = card(repo, run, suite, grouping=cfg.grouping, chosen=chosen, folders=folders)
        try:
            address = upload(
                repo,
                {**files, "README.md": page.encode()},
                message=f"SAEs of {len(suite.layers)} layers, by groupsae",
                private=cfg.private,
                replaced=of_groupsae if cfg.overwrite else None,
            )
        except UserError as error:
            again = f" The folders are in {target}: to do all of it again, add overwrite=true."
            raise UserError(f"{error}{again if chosen else ''}") from error
        print(f"Uploaded {len(files) + 1} files: {address}")


def _run_to_export(cfg: DictConfig) -> Path:
    """Return the run's folder (or its name on the Hub), if the command can be carried out."""
    run = one_folder(cfg)
    if cfg.format is None and cfg.hub is None:
        raise UserError(
            "nothing to do: give format=saelens, sparsify or dictionary_learning, or "
            "hub=<owner/name>, or both."
        )
    if cfg.format is None and cfg.to is not None:
        raise UserError(
            f"to={cfg.to} says where format=... writes, and no format is given: leave it out, or "
            "give format=saelens, sparsify or dictionary_learning."
        )
    if str(run).startswith("hf:"):
        if cfg.format is None:
            raise UserError(f"run={run} is on the Hub already: give format=... to convert it.")
        if cfg.to is None:
            raise UserError(f"run={run} is no folder here: say where to write with to=<folder>.")
    elif not (run / "summary.json").exists():
        finished_run(run, trusted=True)  # builds nothing: says what is missing
    return run


def _show(written: "Sequence[Written]", target: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("folder", "SAE", "largest difference", "ties")
    for each in written:
        ties = f"{each.ties} rows" if each.ties else ""
        table.add_row(each.folder, each.group, f"{each.difference:.1e}", ties)
    console = Console()
    console.print(table)
    console.print(
        "Read back and compared: the difference is a share of the largest output; in tied rows "
        "rounding decides between latents."
    )
    console.print(f"Export: {target}", soft_wrap=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def run(cfg: DictConfig) -> None:
    """Run one configuration of the command."""
    try:
        export(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Start `groupsae-export`, which is `python -m groupsae.export`."""
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "export")
    run()


if __name__ == "__main__":
    main()
