"""Makes a run folder from SAEs that others trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import last_part, locate, save_config
from groupsae.config.identity import without
from groupsae.config.instantiate import make
from groupsae.config.values import TRAINING, check_values, names_of
from groupsae.files.atomic import atomic_folder, check_free
from groupsae.interop.group_sae import FACTORS
from groupsae.interop.library import ImportedSAE
from groupsae.runtime.errors import UserError
from groupsae.suite.card import OF_SAE
from groupsae.suite.hub import Repository, download, repository
from groupsae.suite.importing import (
    READABLE,
    ReadAt,
    is_imported,
    other_model,
    read_folder,
    write_run,
)

# left out of the run's configuration: keys of this command only, and those of training
LEFT_OUT = (
    "saes", "format", "only", "num_groups", "name",
    "sae", "optim", "groups", "calibration", "dead_after", "b_dec_start", "nonfinite", "callbacks",
)  # fmt: skip
# of the stream: the keys that decide the activations
STREAM = ("context", "prepend_bos", "exclude_special_tokens", "skip_positions", "max_norm_ratio")
FILES = (*OF_SAE, FACTORS)


def import_saes(cfg: DictConfig, overrides: Sequence[str] = ()) -> Path:
    """Read the SAEs and write the run folder; return it.

    Options of `stream` that no override gives are those of the run that trained the SAEs, where
    their folders name them.

    Raises:
        UserError: no SAEs that can be read are found, they do not fit the model, or the run
            folder cannot be written.
    """
    if cfg.format is not None and cfg.format not in READABLE:
        raise UserError(f"format is {cfg.format!r}; use {', '.join(READABLE)}.")
    given = str(cfg.saes)
    repo = repository(given)
    only = names_of(cfg.only)
    locate(cfg)
    lm = make(cfg.model)
    model, name = str(cfg.model.name), cfg.name
    if name is None:
        name = Path(given).resolve().name if repo is None else repo.name.replace("/", "--")
    if ".." in Path(str(name)).parts:
        raise UserError(f"name={name} leaves the output folder: give a name, or an absolute path.")
    target = Path(str(cfg.output)) / last_part(model) / "imported" / str(name)
    source = Path(given) if repo is None else None
    check_free(target, overwrite=cfg.overwrite, ours=is_imported, source=source)
    num_layers, d_model = lm.geometry.num_layers, lm.geometry.d_model
    saes = read_folder(
        Path(given) if repo is None else download_saes(repo, only),
        ReadAt(num_layers, d_model, lm.hookpoint, lm.stack, lm.modules),
        format_name=cfg.format,
        only=only,
        num_groups=cfg.num_groups,
    )
    taken = take_split(cfg, saes, overrides)
    with atomic_folder(
        target, overwrite=cfg.overwrite, ours=is_imported, source=source
    ) as temporary:
        (temporary / ".hydra").mkdir()
        plain: Any = OmegaConf.to_container(cfg, resolve=False)
        kept = {**without(plain, LEFT_OUT), "overwrite": False}
        save_config(OmegaConf.create(kept), temporary / ".hydra" / "config.yaml")
        write_run(
            temporary,
            saes,
            num_layers=num_layers,
            facts={**lm.described(), **{key: cfg.stream[key] for key in STREAM}},
            final_path=target,
            source=given if repo is None else f"hf:{repo.name}",
        )
    noted: dict[str, list[str]] = {}
    for sae in saes:
        layers = f"layer{'s' * (len(sae.layers) > 1)} {', '.join(map(str, sae.layers))}"
        print(f"{sae.folder}: {sae.format}, {layers}, {sae.sae.d_sae:,} latents")
        for note in sae.notes:
            noted.setdefault(note, []).append(str(sae.folder))
    for note, folders in noted.items():
        print(f"note: {note} ({', '.join(folders)})")
    other = other_model(saes, model)
    if other is not None:
        print(f"note: the folders name the model {other}, but model is {model}.")
    if taken:
        print(f"note: {' '.join(taken)}: these are the values of the run that trained the SAEs.")
    if any(sae.trained_on.get("text") is None for sae in saes):
        print("note: the training text of SAEs is not known: held-out text may be part of it.")
    elif taken:
        print("note: with the data of that run (data=...) the held-out text is the same as there.")
    return target


def take_split(
    cfg: DictConfig, saes: Sequence[ImportedSAE], overrides: Sequence[str]
) -> list[str]:
    """Set the options of `stream` to those that all SAEs were trained with; return what was set.

    Raises:
        UserError: a folder names a value that is not allowed.
    """
    every = [sae.trained_on.get("stream") for sae in saes]
    theirs = every[0] if all(each == every[0] for each in every) else None
    given = {override.split("=")[0].lstrip("+~") for override in overrides}
    if "tokens" in given:
        given.add("stream.max_tokens")  # derived from it
    taken = []
    for key, value in (theirs if isinstance(theirs, dict) else {}).items():
        known = key in cfg.stream and isinstance(value, bool | int | float | None)
        if known and f"stream.{key}" not in given and cfg.stream[key] != value:
            cfg.stream[key] = value
            taken.append(f"stream.{key}={'null' if value is None else str(value).lower()}")
    check_values(cfg, {k: allowed for k, allowed in TRAINING.items() if k.startswith("stream.")})
    return taken


def download_saes(repo: Repository, only: list[str] | None) -> Path:
    """Return a local copy of the files of SAEs in a repository, of some folders or of all."""
    if only is None:
        return download(repo, [f"*{file}" for file in FILES])
    configs = ["*config.json", f"*{FACTORS}"]
    return download(repo, [f"{pattern}/{file}" for pattern in only for file in FILES] + configs)
