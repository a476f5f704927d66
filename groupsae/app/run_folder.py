"""The run folder: named by the content of the configuration, never by the clock."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

from groupsae.app.stream import check_source
from groupsae.config.identity import FORMAT, RUNTIME, content_hash
from groupsae.config.instantiate import make
from groupsae.config.security import check_own, check_saved
from groupsae.config.values import PLACES, check_training
from groupsae.files.atomic import atomic_write
from groupsae.files.locks import lock_folder
from groupsae.files.reading import damaged
from groupsae.lm import BUNDLED
from groupsae.runtime.commands import argument, command
from groupsae.runtime.errors import UserError
from groupsae.runtime.ranks import check_processes, is_leader
from groupsae.training.checkpoints.folder import checkpoints


class OpenRun(NamedTuple):
    """A run that may begin, or be resumed."""

    cfg: DictConfig  # of a resumed run the saved one
    folder: Path
    checkpoint: Path | None  # to resume from; None at the start


def run_folder(cfg: DictConfig) -> Path:
    """Return outputs/<model>/<grouping>/<tokens>-<sae>-<width>-<seed>-<hash>."""
    if cfg.resume is not None:
        return Path(cfg.resume)
    sae = cfg.sae._target_.split(".")[-2] + (f"-k{cfg.sae.k}" if "k" in cfg.sae else "")
    width = f"n{cfg.sae.d_sae}" if cfg.sae.expansion is None else f"x{cfg.sae.expansion}"
    name = f"{cfg.tokens / 1e6:g}M-{sae}-{width}-s{cfg.seed}-{content_hash(_plain(cfg))}"
    return Path(cfg.output) / last_part(cfg.model.name) / make(cfg.groups).label / name


def last_part(name: str) -> str:
    """Return the last part of a model's name, for a folder inside of `output`.

    >>> last_part("EleutherAI/pythia-14m"), last_part("/models/a/..")
    ('pythia-14m', 'models')
    """
    last = Path(name).name
    return last if last not in ("", "..") else Path(name).resolve().name or "model"


def locate(cfg: DictConfig) -> None:
    """Make the paths of a configuration absolute: they hold from any working folder.

    Raises:
        UserError: a folder is given with a revision, which only the Hub has.
    """
    for holder in (cfg.model, cfg.data):
        name = holder.get("name")
        local = name is not None and name not in BUNDLED and Path(name).is_dir()
        if local:
            holder.name = absolute(name)
        if holder.get("revision") is not None and (local or name in BUNDLED):
            key = "model" if holder is cfg.model else "data"
            raise UserError(
                f"{key}.revision={holder.revision} chooses a revision on the Hub, but "
                f"{key}.name={name} is a folder here: leave {key}.revision out, or give the name "
                "on the Hub."
            )
    for key in ("path", "cache"):
        if cfg.data.get(key) is not None:
            cfg.data[key] = absolute(cfg.data[key])


def absolute(path: str) -> str:
    """Return a path that holds from any working folder; links stay what they are."""
    place = Path(path).expanduser()
    return str(place.resolve() if ".." in place.parts else place.absolute())


def register_resolver() -> None:
    """Make `${run_folder:}` available to the yaml files."""
    OmegaConf.register_new_resolver(
        "run_folder", lambda *, _root_: str(run_folder(_root_)), replace=True
    )


@contextmanager
def open_run(cfg: DictConfig, overrides: list[str]) -> Iterator[OpenRun]:
    """Check a configuration and give its run; other runs are kept out of the folder until the end.

    An unfinished run of the same content is resumed. Nothing is replaced without
    `overwrite=true`, and `dry_run=true` changes nothing. The folder of a command that
    is refused before it wrote anything is removed again.

    Raises:
        UserError: a value is not allowed; the text does not exist; `resume` names no run, or the
            command's values differ from that run's; another process uses the folder, or it cannot
            be written.
    """
    check_own(cfg)
    check_training(cfg)
    resumed = cfg.resume is not None
    if resumed:
        cfg = _resumed(cfg, overrides)
    check_processes(cfg.trainer)
    folder = run_folder(cfg)  # named by what was given, so that the same command finds it
    if not resumed:
        locate(cfg)
        cfg.resume = str(folder)  # from now on the name of the folder is not made from `cfg`
    if cfg.overwrite or not (folder / "summary.json").exists():  # a finished run is only shown
        check_source(cfg.data)
    if cfg.dry_run:
        yield OpenRun(cfg, folder, None)
        return
    with lock_folder(folder) if is_leader() else nullcontext():
        if is_leader():
            if cfg.overwrite:
                _clear(folder)
            save_config(cfg, folder / ".hydra" / "config.yaml")
            if not resumed:  # a resumed run keeps its first command
                with atomic_write(folder / ".hydra" / "overrides.yaml", "w") as handle:
                    OmegaConf.save(overrides, handle)
        try:
            existing = [] if cfg.overwrite else checkpoints(folder / "checkpoints")
            yield OpenRun(cfg, folder, existing[0] if existing else None)
        except UserError:
            if is_leader() and {path.name for path in folder.iterdir()} <= {".hydra"}:
                shutil.rmtree(folder)
            raise


def one_folder(cfg: DictConfig) -> Path:
    """Return the run folder that `run=` names.

    Raises:
        UserError: it names none or several.
    """
    named = None if OmegaConf.is_missing(cfg, "run") else cfg.run
    folders = list(named) if isinstance(named, ListConfig) else [named]
    if named is None or not folders:
        raise UserError("which run? Give run=<folder>, such as run=outputs/tiny/amad-0.2/<...>")
    if len(folders) > 1:
        commands = " and ".join(argument("run", folder) for folder in dict.fromkeys(folders))
        raise UserError(
            f"run names {len(folders)} folders, but this command takes one at a time: give "
            f"{commands}, each in a separate command."
        )
    return Path(str(folders[0]))


def named_run(cfg: DictConfig) -> tuple[Path, DictConfig]:
    """Return the folder and the configuration of the finished run that a command names.

    Model and text are looked for where the command says, and its loggers take the place of the
    run's.

    Raises:
        UserError: as `one_folder` and `finished_run`, or the run has no such model or text.
    """
    folder = one_folder(cfg)
    trained = finished_run(folder, trusted=cfg.trust_remote_code)
    for key in PLACES:
        place = OmegaConf.select(cfg, key)
        if place is None:
            continue
        if OmegaConf.select(trained, key) is None:
            raise UserError(f"{key}={place}: the run in {folder} has no {key}, so leave it out.")
        OmegaConf.update(trained, key, absolute(place) if Path(place).exists() else place)
    if cfg.get("logger") is not None:
        trained.logger = cfg.logger
    return folder, trained


def finished_run(folder: Path, *, trusted: bool) -> DictConfig:
    """Return the configuration of a finished run, perhaps a stranger's.

    `trusted`: the language model's own code may run.

    Raises:
        UserError: there is no run, it is not finished, or its configuration asks for what only
            the command line may allow.
    """
    saved = _saved_config(folder, "run", trusted)
    if not (folder / "summary.json").exists():
        raise UserError(
            f"run={folder} has no SAEs yet: it was not finished. Finish it with\n"
            f"  {command('train', resume=folder)}"
        )
    saved.resume = str(folder)
    return saved


def save_config(cfg: DictConfig, path: Path) -> None:
    """Write a run's configuration, with the format of its folder as the last key."""
    with atomic_write(path, "w") as handle:
        OmegaConf.save({**_plain(cfg), "resume": None, "run_format": FORMAT}, handle)


def _saved_config(folder: Path, key: str, trusted: bool) -> DictConfig:
    register_resolver()  # which the loggers' and callbacks' folders need
    path = folder / ".hydra" / "config.yaml"
    if not path.exists():
        raise UserError(
            f"{key}={folder}: no run there (no .hydra/config.yaml). Name a run folder such as "
            "outputs/tiny/amad-0.2/<...>."
        )
    try:
        saved = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError):
        saved = None
    if not isinstance(saved, DictConfig) or "run_format" not in saved:  # near the end
        raise damaged(path)
    if saved.run_format != FORMAT:
        raise UserError(
            f"{key}={folder}: its configuration has format {saved.run_format}, this version of "
            f"groupsae reads {FORMAT}: use the one that wrote it, or train again."
        )
    check_saved(saved, folder, key=key, trusted=trusted)
    around = folder.absolute().parents[:3]  # the caches are in the output folder of today
    if len(around) == 3 and (around[2] / "cache").is_dir():
        saved.output = str(around[2])
    return saved


def _clear(folder: Path) -> None:
    """Remove everything from a run folder but .hydra, which holds the lock of this process."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink() and path.name != ".hydra":
            shutil.rmtree(path)
        elif path.name != ".hydra":
            path.unlink()


def _resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of the run that `resume` names, with the values that may differ."""
    folder = Path(cfg.resume)
    given = {override.lstrip("+").replace(" ", "").lower() for override in overrides}
    trusted = "model.load.trust_remote_code=true" in given
    saved = _saved_config(folder, "resume", trusted)
    if "sae" not in saved:
        raise UserError(
            f"resume={folder}: its SAEs were imported, not trained here, so there is no training "
            f"to resume. Evaluate them: {command('evaluate', run=folder)}"
        )
    for key in (str(key) for key in cfg if key not in saved and key in RUNTIME):
        saved[key] = cfg[key]  # that an earlier version did not have
    locate(cfg)
    keys = {o: o.split("=")[0].lstrip("+~").split("@")[0].replace("/", ".") for o in overrides}
    for key in (key for key in PLACES if key in keys.values() and OmegaConf.select(saved, key)):
        place = OmegaConf.select(cfg, key)
        if place is not None and Path(place).exists():  # is it the same? `GroupLayers.confirm`
            OmegaConf.update(saved, key, place)
    before = content_hash(_plain(saved))
    for override, key in keys.items():
        new, old = OmegaConf.select(cfg, key), OmegaConf.select(saved, key)
        if key.startswith(RUNTIME):
            OmegaConf.update(saved, key, new, merge=False, force_add=True)
        elif key.split(".")[0] not in saved or new != old:
            raise UserError(
                f"resume={folder}: {override} differs from what the run was started with "
                f"({key}={old}). Leave it out to resume, or start a new run without resume."
            )
    if content_hash(_plain(saved)) != before:
        more = " ".join(o for o in overrides if not o.startswith("resume="))
        raise UserError(f"resume={folder}: {more} would change the result; leave it out.")
    saved.resume, saved.overwrite = str(folder), False
    return saved


def _plain(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=False)
