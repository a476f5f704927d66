"""The run folder: named by the content of the configuration, never by the clock."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

from groupsae.config.arguments import make
from groupsae.config.identity import RUNTIME, decisive
from groupsae.config.security import check_own, check_saved
from groupsae.data.store.options import check_store
from groupsae.evaluation.options import check_options
from groupsae.files.atomic import atomic_write
from groupsae.files.locks import lock_folder
from groupsae.files.reading import damaged
from groupsae.runtime.errors import UserError
from groupsae.runtime.ranks import check_processes, is_leader
from groupsae.training.checkpoints.folder import checkpoints

FORMAT = 3  # of a run folder: what its configuration says and its files hold
PLACE = ("accelerator", "devices", "num_nodes", "strategy", "precision", "profiler")


def content(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of the configuration that decides the result."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    values = decisive(plain)
    # of the trainer only what someone added that is neither a place nor a display counts
    added = {
        k: v for k, v in cfg.trainer.items() if k not in PLACE and not k.startswith("enable_")
    }
    return {**values, "trainer": added} if added else values


def content_hash(cfg: DictConfig) -> str:
    """Return 8 hex digits over `content`."""
    return hashlib.sha256(json.dumps(content(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_folder(cfg: DictConfig) -> Path:
    """Return outputs/<model>/<grouping>/<tokens>-<sae>-<width>-<seed>-<hash>."""
    if cfg.resume is not None:
        return Path(cfg.resume)
    model = Path(cfg.model.name).name
    tokens = f"{cfg.tokens / 1e6:g}M"
    sae = cfg.sae._target_.split(".")[-2] + (f"-k{cfg.sae.k}" if "k" in cfg.sae else "")
    width = f"n{cfg.sae.d_sae}" if cfg.sae.expansion is None else f"x{cfg.sae.expansion}"
    name = f"{tokens}-{sae}-{width}-s{cfg.seed}-{content_hash(cfg)}"
    return Path(cfg.output) / model / make(cfg.groups).label / name


POSITIVE = (  # counts
    "tokens",
    "dead_after",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "calibration.tokens",
    "stream.context",
    "stream.blocks_per_step",
    "stream.blocks_per_forward",
    "stream.heldout_tokens",
)


def check_values(cfg: DictConfig) -> None:
    """Raise UserError if a mandatory value is missing or a number is out of range."""
    # (the loggers' folder is worked out from the rest, so it cannot be looked at yet)
    rest = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "logger"])
    missing = sorted(OmegaConf.missing_keys(rest))
    if missing:
        raise UserError(f"{missing[0]} has no default: give {missing[0]}=<value>.")
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} is {value!r}; it must be a whole number of at least 1.")
    for key in ("stream.heldout_fraction", "stream.calibration_fraction"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, float) or not 0 < value < 0.5:
            raise UserError(f"{key} is {value!r}; it must lie between 0 and 0.5.")
    for key in ("stream.num_workers", "seed"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 0:
            raise UserError(f"{key} is {value!r}; it must be a whole number of at least 0.")
    for key in ("optim.base_lr", "optim.clip_norm"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{key} is {value!r}; it must be a number above 0.")
    if cfg.run_format != FORMAT:
        raise UserError(
            f"run_format is {cfg.run_format!r}; leave it at {FORMAT}, it is not to be set."
        )
    check_store(cfg.data.get("cache"), cfg.data.get("cache_dtype"))
    if cfg.trainer.precision != "32-true":
        raise UserError(
            f"trainer.precision is {cfg.trainer.precision!r}; the SAEs train in 32-true. The "
            "language model's own precision is model.dtype=bfloat16."
        )
    if cfg.trainer.get("accumulate_grad_batches", 1) != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {cfg.trainer.accumulate_grad_batches}; a step of "
            "the SAEs is one batch. Raise stream.blocks_per_step instead: "
            "stream.blocks_per_forward bounds the language model's memory."
        )
    if cfg.evaluate:
        options: Any = OmegaConf.to_container(cfg.evaluation)
        check_options(options)
    if cfg.calibration.centring not in ("none", "mean"):
        raise UserError(
            f"calibration.centring is {cfg.calibration.centring!r}: use none (the "
            "paper's formula) or mean."
        )


@contextmanager
def alone(cfg: DictConfig) -> Iterator[None]:
    """Keep other runs out of the run folder; the processes of one run are no other runs.

    Raises:
        UserError: another run is in it.
    """
    check_own(cfg)  # settles what the folder's name is made of
    check_values(cfg)
    if cfg.resume is None:
        check_processes(cfg.trainer)
    folder = run_folder(cfg)
    there = cfg.resume is None or (folder / ".hydra").is_dir()  # nothing is made where no run is
    writes = there and is_leader() and not cfg.dry_run
    with lock_folder(folder) if writes else nullcontext():
        yield


def register_resolver() -> None:
    """Make `${run_folder:}` available to the yaml files."""
    OmegaConf.register_new_resolver(
        "run_folder", lambda *, _root_: str(run_folder(_root_)), replace=True
    )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, if there is any; it may be damaged."""
    return next(iter(checkpoints(folder / "checkpoints")), None)


def open_run(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, Path, Path | None]:
    """Return the configuration to use, the run folder and the checkpoint to go on from.

    An unfinished run of the same content is gone on with; a finished one is for the caller to
    recognise by its `summary.json`; nothing is overwritten unless `overwrite=true`.

    Raises:
        UserError: `resume` names no run, or the command asks for something else than the run
            was started with, or the folder cannot be written.
    """
    check_own(cfg)
    check_values(cfg)
    folder = run_folder(cfg)
    if cfg.resume is not None:
        cfg = _config_to_resume(cfg, folder, overrides)
        check_processes(cfg.trainer)  # now that the run's own trainer is known
    if cfg.dry_run:  # leaves everything as it is
        return cfg, folder, None
    if cfg.resume is None and cfg.overwrite and folder.exists() and is_leader():
        _clear(folder)
    if is_leader():
        _remember(cfg, folder, overrides)
    return cfg, folder, None if cfg.overwrite else last_checkpoint(folder)


def one_folder(cfg: DictConfig) -> Path:
    """Return the run folder that `run=` names.

    Raises:
        UserError: it names none or several.
    """
    named = None if OmegaConf.is_missing(cfg, "run") else cfg.run
    if named is None:
        raise UserError("which run? Give run=<folder>, such as run=outputs/tiny/amad-0.2/<...>")
    folders = [str(each) for each in named] if isinstance(named, ListConfig) else [str(named)]
    if len(folders) != 1:
        each = " and ".join(quote(f"run={folder}") for folder in dict.fromkeys(folders))
        raise UserError(
            f"run names {len(folders)} folders, but this command takes one at a time: give {each}"
            f"{', each in a command of its own' if len(set(folders)) > 1 else ' once'}."
        )
    return Path(folders[0])


def finished_run(folder: Path, *, trusted: bool) -> DictConfig:
    """Return the configuration of a finished run.

    Args:
        folder: of the run, perhaps a stranger's.
        trusted: whether the language model's own code may run.

    Raises:
        UserError: there is no run, it is not finished, or its configuration asks for what only
            the command line may allow.
    """
    saved = _saved_config(folder, "run", trusted)
    if not (folder / "summary.json").exists():
        raise UserError(
            f"run={folder} has no SAEs yet: it was not finished. Finish it with\n"
            f"  python -m groupsae.train {quote(f'resume={folder}')}"
        )
    saved.resume = str(folder)
    return saved


def _saved_config(folder: Path, key: str, trusted: bool) -> DictConfig:
    saved_file = folder / ".hydra" / "config.yaml"
    if not saved_file.exists():
        raise UserError(
            f"{key}={folder}: no run there (no .hydra/config.yaml). Name a run "
            "folder such as outputs/tiny/amad-0.2/<...>."
        )
    try:
        saved = OmegaConf.load(saved_file)
    except (YAMLError, OmegaConfBaseException, OSError):
        saved = None
    if not isinstance(saved, DictConfig) or "overwrite" not in saved:  # always near the end
        raise damaged(saved_file)
    if saved.get("run_format") != FORMAT:
        raise UserError(
            f"{key}={folder}: its configuration has format {saved.get('run_format', 1)}, this "
            f"version of groupsae reads {FORMAT}: use the one that wrote it, or train again."
        )
    check_saved(saved, folder, key=key, trusted=trusted)
    return saved


def _remember(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Write the configuration into the run folder; a resumed run keeps its first command."""
    with atomic_write(folder / ".hydra" / "config.yaml", "w") as handle:
        OmegaConf.save(cfg, handle)
    if cfg.resume is None:
        with atomic_write(folder / ".hydra" / "overrides.yaml", "w") as handle:
            OmegaConf.save(overrides, handle)


def forget(folder: Path) -> None:
    """Remove a run folder that remembers a command and nothing else: it was refused."""
    if is_leader() and folder.is_dir() and {p.name for p in folder.iterdir()} <= {".hydra"}:
        shutil.rmtree(folder)


def _clear(folder: Path) -> None:
    """Remove everything from a run folder but the lock that this process holds there."""
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink() and each.name != ".hydra":
            shutil.rmtree(each)
        elif each.name != ".hydra":
            each.unlink()


def _config_to_resume(cfg: DictConfig, folder: Path, overrides: list[str]) -> DictConfig:
    said = {override.lstrip("+").replace(" ", "").lower() for override in overrides}
    trusted = "model.load.trust_remote_code=true" in said
    saved = _saved_config(folder, "resume", trusted)
    if "sae" not in saved:
        raise UserError(
            f"resume={folder}: its SAEs were trained elsewhere and adopted, so no training can go "
            f"on. Evaluate them: python -m groupsae.evaluate {quote(f'run={folder}')}"
        )
    before = content_hash(saved)
    for override in overrides:
        key = override.split("=")[0].lstrip("+~").split("@")[0].replace("/", ".")
        new, old = OmegaConf.select(cfg, key), OmegaConf.select(saved, key)
        if key.startswith(RUNTIME):
            OmegaConf.update(saved, key, new, merge=False, force_add=True)
        if key.split(".")[0] not in saved or (new != old and not key.startswith(RUNTIME)):
            raise UserError(
                f"resume={folder}: {override} differs from what the run was started with "
                f"({key}={old}). Leave it out to go on, or start a new run without resume."
            )
    if content_hash(saved) != before:
        given = " ".join(o for o in overrides if not o.startswith("resume="))
        raise UserError(f"resume={folder}: {given} would change the result; leave it out.")
    saved.resume, saved.overwrite = str(folder), False
    return saved
