"""Make a run of SAEs that others trained.

`python -m groupsae.import_saes path=<folder> model=<model>`

The run folder is what `groupsae.evaluate` and `groupsae.report` take.
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import register_resolver
from groupsae.config.arguments import CONF, check_arguments, make, plain_folder
from groupsae.config.identity import without
from groupsae.config.security import check_own
from groupsae.runtime.errors import UserError

OWN = ("path", "format", "only", "num_groups", "to")
# of the training, which was not ours
TRAINING = ("sae", "optim", "groups", "calibration", "dead_after", "b_dec_start", "nonfinite")
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

    Raises:
        UserError: nothing that can be read is there, it does not fit the model, or the run folder
            cannot be written.
    """
    if OmegaConf.is_missing(cfg, "path") or cfg.path is None:
        raise UserError("which SAEs? Give path=<folder>, or path=hf:<owner/name>.")
    if cfg.evaluate:
        raise UserError(
            "evaluate=true is for training: import first, then evaluate the run folder that it "
            "names: python -m groupsae.evaluate run=<folder>."
        )
    check_own(cfg)
    from groupsae.files.atomic import atomic_folder, check_free
    from groupsae.interop.incoming import READABLE, is_adopted, lay_out, other_model, read_folder
    from groupsae.suite.hub import repository  # slow, after the cheap checks

    if cfg.format is not None and cfg.format not in READABLE:
        raise UserError(f"format is {cfg.format!r}; use {', '.join(READABLE)}.")
    given = str(cfg.path)
    repo = repository(given)
    only = [cfg.only] if isinstance(cfg.only, str) else cfg.only and [str(p) for p in cfg.only]
    lm = make(cfg.model)
    name = Path(given).resolve().name if repo is None else repo.name.replace("/", "--")
    short = Path(str(cfg.model.name)).name
    target = Path(str(cfg.output)) / short / "adopted" / name if cfg.to is None else Path(cfg.to)
    source = Path(given) if repo is None else None
    check_free(target, overwrite=cfg.overwrite, ours=is_adopted, source=source)
    folder = source or _download(repo, only)
    read = read_folder(
        folder,
        form=cfg.format,
        only=only,
        num_groups=cfg.num_groups,
        num_layers=lm.geometry.num_layers,
        d_model=lm.geometry.d_model,
        hookpoint=lm.hookpoint,
        stack=lm.stack,
    )
    facts = {**lm.described(), **{key: cfg.stream[key] for key in STREAM}}
    with atomic_folder(target, overwrite=cfg.overwrite, ours=is_adopted, source=source) as beside:
        (beside / ".hydra").mkdir()
        plain: Any = OmegaConf.to_container(cfg, resolve=False)
        kept = {**without(plain, OWN + TRAINING), "overwrite": False}
        OmegaConf.save(kept, beside / ".hydra" / "config.yaml")
        lay_out(
            beside,
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
    other = other_model(read, str(cfg.model.name))
    if other is not None:
        print(f"note: the folders name the model {other}, and model is {cfg.model.name}.")
    print("note: what they were trained on is not known: held-out text may be some of it.")
    return target


def _download(repo: Any, only: list[str] | None) -> Path:
    from groupsae.suite.hub import download

    if only is None:
        return download(repo, [f"*{file}" for file in FILES])
    beside = ["*config.json", "*scaling_factors.pt"]
    return download(repo, [f"{p}/{file}" for p in only for file in FILES] + beside)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="import_saes")
def run(cfg: DictConfig) -> None:
    """Run one configuration of the command."""
    try:
        folder = import_saes(cfg)
        print(f"Language model: {cfg.model.name}\nRun folder: {folder}")
        print(f"Next: python -m groupsae.evaluate run={folder}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Start `groupsae-import-saes`, which is `python -m groupsae.import_saes`."""
    register_resolver()
    sys.argv[1:] = [plain_folder(argument) for argument in sys.argv[1:]]
    check_arguments(sys.argv[1:], "import_saes")
    run()


if __name__ == "__main__":
    main()
