"""Makes a run folder of SAEs that others trained."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import save_config
from groupsae.config.identity import without
from groupsae.config.instantiate import make
from groupsae.files.atomic import atomic_folder, check_free
from groupsae.interop.incoming import READABLE, is_adopted, lay_out, other_model, read_folder
from groupsae.runtime.errors import UserError
from groupsae.suite.hub import Repository, download, repository

# not part of the run's configuration: the command's own keys, and the training, which was not ours
LEFT_OUT = (
    "saes", "format", "only", "num_groups", "name",
    "sae", "optim", "groups", "calibration", "dead_after", "b_dec_start", "nonfinite", "callbacks",
)  # fmt: skip
# of the stream: what decides the activations
STREAM = ("context", "prepend_bos", "exclude_special_tokens", "skip_positions", "max_norm_ratio")
FILES = (
    "cfg.json",
    "config.json",
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
    "scaling_factors.pt",
)


def import_saes(cfg: DictConfig) -> Path:
    """Read the SAEs and write the run folder; return it.

    Args:
        cfg: conf/import_saes.yaml.

    Raises:
        UserError: no SAEs that can be read are there, they do not fit the model, or the run
            folder cannot be written.
    """
    if cfg.format is not None and cfg.format not in READABLE:
        raise UserError(f"format is {cfg.format!r}; use {', '.join(READABLE)}.")
    given = str(cfg.saes)
    repo = repository(given)
    only = [cfg.only] if isinstance(cfg.only, str) else cfg.only and [str(p) for p in cfg.only]
    lm = make(cfg.model)
    model, name = str(cfg.model.name), cfg.name
    if name is None:
        name = Path(given).resolve().name if repo is None else repo.name.replace("/", "--")
    target = Path(str(cfg.output)) / Path(model).name / "imported" / str(name)
    source = Path(given) if repo is None else None
    check_free(target, overwrite=cfg.overwrite, ours=is_adopted, source=source)
    read = read_folder(
        source or download_saes(repo, only),
        form=cfg.format,
        only=only,
        num_groups=cfg.num_groups,
        num_layers=lm.geometry.num_layers,
        d_model=lm.geometry.d_model,
        hookpoint=lm.hookpoint,
        stack=lm.stack,
    )
    facts = {**lm.described(), **{key: cfg.stream[key] for key in STREAM}}
    with atomic_folder(target, overwrite=cfg.overwrite, ours=is_adopted, source=source) as made:
        (made / ".hydra").mkdir()
        plain: Any = OmegaConf.to_container(cfg, resolve=False)
        kept = {**without(plain, LEFT_OUT), "overwrite": False}
        save_config(OmegaConf.create(kept), made / ".hydra" / "config.yaml")
        lay_out(
            made,
            read,
            num_layers=lm.geometry.num_layers,
            facts=facts,
            named=target,
            source=given if repo is None else f"hf:{repo.name}",
        )
    for each in read:
        layers = ", ".join(map(str, each.layers))
        print(f"{each.folder}: {each.format}, layers {layers}, {each.sae.d_sae:,} latents")
        for note in each.notes:
            print(f"  note: {note}")
    other = other_model(read, model)
    if other is not None:
        print(f"note: the folders name the model {other}, and model is {model}.")
    print("note: what they were trained on is not known: held-out text may be some of it.")
    return target


def download_saes(repo: Repository | None, only: list[str] | None) -> Path:
    """Return a local copy of the files of SAEs in a repository, of some folders or of all."""
    assert repo is not None
    if only is None:
        return download(repo, [f"*{file}" for file in FILES])
    configs = ["*config.json", "*scaling_factors.pt"]
    return download(repo, [f"{pattern}/{file}" for pattern in only for file in FILES] + configs)
