"""The run folder: named by the content of the configuration, never by the clock."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from groupsae.config import make
from groupsae.errors import UserError

# what may differ between two starts of one run: where and how fast it computes, who watches
RUNTIME = (
    "trainer",
    "logger",
    "output",
    "resume",
    "overwrite",
    "log_every",
    "stream.num_workers",
    "checkpoint_every",
)


def content(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of the configuration that decides the result."""
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    for key in RUNTIME:
        *parents, last = key.split(".")
        holder: Any = values
        for parent in parents:
            holder = holder.get(parent, {})
        holder.pop(last, None)
    return dict(values)


def content_hash(cfg: DictConfig) -> str:
    """Return 8 hex digits over `content`."""
    return hashlib.sha256(json.dumps(content(cfg), sort_keys=True).encode()).hexdigest()[:8]


def run_folder(cfg: DictConfig) -> Path:
    """Return outputs/<model>/<grouping>/<tokens>-<k>-<width>-<seed>-<hash>."""
    if cfg.resume is not None:
        return Path(cfg.resume)
    model = Path(cfg.model.name).name
    tokens = f"{cfg.tokens / 1e6:g}M"
    name = f"{tokens}-k{cfg.sae.k}-x{cfg.sae.expansion}-s{cfg.seed}-{content_hash(cfg)}"
    return Path(cfg.output) / model / make(cfg.groups).label / name


POSITIVE = (
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


def check_numbers(cfg: DictConfig) -> None:
    """Raise UserError if a count is not a positive whole number."""
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} is {value!r}; it must be a whole number of at least 1.")
    for key in ("stream.heldout_fraction", "stream.calibration_fraction"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, float) or not 0 < value < 0.5:
            raise UserError(f"{key} is {value!r}; it must lie between 0 and 0.5.")
    if cfg.calibration.centring not in ("none", "mean"):
        raise UserError(
            f"calibration.centring is {cfg.calibration.centring!r}: use none (the "
            "paper's formula) or mean."
        )


def is_leader() -> bool:
    """Return whether this is the first process: the others must not touch what it began."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def register_resolver() -> None:
    """Make `${run_folder:}` available to the yaml files."""
    OmegaConf.register_new_resolver(
        "run_folder", lambda *, _root_: str(run_folder(_root_)), replace=True
    )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, if there is any."""
    found = {int(p.stem.split("=")[1]): p for p in (folder / "checkpoints").glob("step=*.ckpt")}
    return found[max(found)] if found else None


def open_run(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, Path, Path | None]:
    """Return the configuration to use, the run folder and the checkpoint to go on from.

    An unfinished run of the same content is gone on with; a finished one is for the caller to
    recognise by its `summary.json`; nothing is overwritten unless `overwrite=true`.

    Raises:
        UserError: `resume` names no run, or the command asks for something else than the run
            was started with, or the folder cannot be written.
    """
    check_numbers(cfg)
    folder = run_folder(cfg)
    if cfg.resume is not None:
        cfg = _config_to_resume(cfg, folder, overrides)
    elif cfg.overwrite and folder.exists() and is_leader():
        shutil.rmtree(folder)
    if not is_leader():
        return cfg, folder, last_checkpoint(folder)
    try:
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
        OmegaConf.save(overrides, folder / ".hydra" / "overrides.yaml")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. Set output=<folder> to a "
            "place that can be written."
        ) from error
    return cfg, folder, last_checkpoint(folder)


def _config_to_resume(cfg: DictConfig, folder: Path, overrides: list[str]) -> DictConfig:
    saved_file = folder / ".hydra" / "config.yaml"
    if not saved_file.exists():
        raise UserError(
            f"resume={folder}: no run there (no .hydra/config.yaml). Name a run "
            "folder such as outputs/tiny/amad-0.2/<...>."
        )
    saved = OmegaConf.load(saved_file)
    assert isinstance(saved, DictConfig)
    for override in overrides:
        key = override.split("=")[0].lstrip("+~").split("@")[0].replace("/", ".")
        new = OmegaConf.select(cfg, key)
        if key.startswith(RUNTIME):
            OmegaConf.update(saved, key, new, force_add=True)
        elif new != OmegaConf.select(saved, key):
            raise UserError(
                f"resume={folder}: {override} differs from what the run was started with "
                f"({key}={OmegaConf.select(saved, key)}). Leave it out to go on, or start a new "
                "run without resume."
            )
    saved.resume = str(folder)
    return saved
