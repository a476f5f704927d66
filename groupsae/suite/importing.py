"""Reads the SAEs in a folder of another library, and writes them as a run of ours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from groupsae import __version__
from groupsae.files.atomic import write_json
from groupsae.files.reading import damaged, read_json
from groupsae.grouping.partition import Partition
from groupsae.grouping.plan import GroupPlan, name_of
from groupsae.interop import group_sae
from groupsae.interop.formats import FORMATS
from groupsae.interop.library import (
    TRAINED_ON,
    ImportedSAE,
    as_config,
    our_training_text,
    same_output,
)
from groupsae.interop.saelens import lens_model
from groupsae.runtime.errors import UserError
from groupsae.suite.hub import looks_like_name
from groupsae.suite.suite import save_sae

GROUP_SAE = "group-sae"
READABLE = (*FORMATS, GROUP_SAE)
UNKNOWN = float("nan")  # diameter of a group whose distances nobody measured


@dataclass(frozen=True)
class ReadAt:
    """Where the language model is read: SAEs must fit its depth, width, hookpoint and stack."""

    num_layers: int
    d_model: int
    hookpoint: str
    stack: str
    modules: Sequence[str] | None = None  # path of the module that is read, by layer


def read_folder(
    path: Path,
    at: ReadAt,
    *,
    format_name: str | None = None,
    only: Sequence[str] | None = None,
    num_groups: int | None = None,
) -> list[ImportedSAE]:
    """Return the SAEs in a folder and its subfolders, at most one for each layer.

    `format_name` is one of `READABLE`; None recognises it by the files. `only` are patterns of the
    folders to read, relative to the path, such as `layers.3`. `num_groups` chooses a published
    partition of the paper's checkpoints; None: one SAE a layer.

    Raises:
        UserError: no SAE is found, one is damaged or of another kind, they do not fit the
            language model, or two serve one layer.
    """
    formats = _formats_in(path, format_name)
    if only is not None:
        formats = {
            folder: name
            for folder, name in formats.items()
            if any(fnmatch(_relative(folder, path), pattern) for pattern in only)
        }
        if num_groups is not None:
            raise UserError(
                f"num_groups={num_groups} and only={list(only)} both choose folders: give one."
            )
    elif GROUP_SAE in formats.values():
        theirs = [folder for folder, name in formats.items() if name == GROUP_SAE]
        chosen = group_sae.choose(theirs, num_groups, at.num_layers)
        formats = {f: name for f, name in formats.items() if name != GROUP_SAE or f in chosen}
    elif num_groups is not None:
        raise UserError(
            f"num_groups={num_groups} chooses among the paper's checkpoints (folders baseline and "
            f"cluster), and {path} has none: leave num_groups out."
        )
    if not formats and only is None and any(path.glob("**/groups.json")):
        raise UserError(
            f"{path} contains a run of groupsae, which needs no import: give "
            "python -m groupsae.evaluate run=<run folder>."
        )
    if not formats:
        matching = f" that match only={list(only)}" if only is not None else ""
        raise UserError(
            f"no SAEs in {path}{matching}. The formats that can be read are "
            f"{', '.join(READABLE)}: a folder with sae_weights.safetensors, sae.safetensors or "
            "ae.pt, and its configuration."
        )
    saes = [_read(folder, name, path, at.num_layers) for folder, name in formats.items()]
    _check(saes, path, at)
    return [replace(sae, folder=Path(_relative(sae.folder, path))) for sae in saes]


def write_run(
    run: Path,
    saes: Sequence[ImportedSAE],
    *,
    num_layers: int,
    facts: dict[str, Any],
    final_path: Path,
    source: str,
) -> None:
    """Write `saes/`, `groups.json` and `summary.json` of a run whose SAEs others trained.

    Their `cfg.json` names the text that they were trained on if an export of ours does, and no
    weights. `facts` of the language model and the text go into each; `final_path` is the path
    that the folder `run` will get, and `source` the folder or repository that they come from.
    """
    for sae in saes:
        config = {
            **as_config(sae.sae),
            "d_sae": sae.sae.d_sae,
            "width": 1.0,
            "layers": sae.layers,
            "norm_factors": sae.norm_factors,
            **facts,
            "weights": None,
            **dict.fromkeys(TRAINED_ON),
            **sae.trained_on,
            "tokens": None,
            "adopted": {  # the key of earlier versions, which called an import so
                "source": source,
                "folder": str(sae.folder),
                "format": sae.format,
                "notes": sae.notes,
            },
            "groupsae": __version__,
        }
        save_sae(run / "saes" / name_of(sae.layers), sae.sae, config)
    plan = plan_of(saes, num_layers)
    names = {name_of(sae.layers): sae.layers for sae in saes}
    measured = {"model": facts["model"], "revision": facts["revision"]}
    groups = {"plan": plan.to_json(), "hash": plan.hash, "saes": names, "measured": measured}
    write_json(run / "groups.json", groups)
    summary = {
        "folder": str(final_path),
        "adopted": source,
        "groups": {},
        "chosen": list(names),
        "steps": 0,
        "groupsae": __version__,
    }
    write_json(run / "summary.json", summary)  # the last file: it marks the run as finished


def is_imported(run: Path) -> bool:
    """Return whether a folder is a run that an import wrote."""
    return "adopted" in (read_json(run / "summary.json") or {})


def plan_of(saes: Sequence[ImportedSAE], num_layers: int) -> GroupPlan:
    """Return the plan of these SAEs; layers that none serves are in groups without an SAE.

    Raises:
        UserError: the layers of an SAE are not neighbours.
    """
    groups = {sae.layers[0]: sae.layers for sae in saes}
    served = {layer for layers in groups.values() for layer in layers}
    unserved = [layer for layer in range(num_layers) if layer not in served]
    ordered = [group for _, group in sorted({**groups, **{x: [x] for x in unserved}}.items())]
    diameters = [0.0 if len(group) == 1 else UNKNOWN for group in ordered]
    return GroupPlan(
        Partition(ordered, diameters, "imported"), "group", num_layers, unserved=tuple(unserved)
    )


def other_model(saes: Sequence[ImportedSAE], model: str) -> str | None:
    """Return the language model that the folders name, if it is not this one."""
    for sae in saes:
        named = None if sae.place.model is None else str(sae.place.model)
        if named is not None and lens_model(named) not in (lens_model(model), model):
            return named
    return None


def _formats_in(path: Path, wanted: str | None) -> dict[Path, str]:
    """Return the folders of SAEs -> their format, sorted by the numbers in their names."""
    if not path.is_dir():
        raise UserError(
            f"saes={path}: there is no such folder. Name one, or a repository of the Hub as "
            f"saes=hf:{path if looks_like_name(str(path)) else 'owner/name'}."
        )
    formats = {}
    for folder in sorted([path, *(p for p in path.rglob("*") if p.is_dir())], key=_by_number):
        if any(part.startswith(".") for part in folder.relative_to(path).parts):
            continue
        matches = [name for name, library in FORMATS.items() if library.recognises(folder)]
        name = GROUP_SAE if group_sae.recognises(folder) else next(iter(matches), None)
        if name is None:
            continue
        # (sparsify and group-sae have the same files, apart from the factors)
        if wanted not in (None, name) and {name, wanted} != {GROUP_SAE, "sparsify"}:
            raise UserError(f"{folder} is a folder of {name}, not of format={wanted}.")
        formats[folder] = wanted or name
    return formats


def _by_number(folder: Path) -> list[tuple[int, str]]:
    words = [word for part in folder.parts for word in part.split(".")]
    return [(int(word) if word.isdigit() else 0, word) for word in words]


def _relative(folder: Path, path: Path) -> str:
    return folder.relative_to(path).as_posix() if folder != path else path.name


def _read(folder: Path, name: str, root: Path, num_layers: int) -> ImportedSAE:
    try:
        if name == GROUP_SAE:
            sae = group_sae.read(folder, num_layers)
        else:
            sae = FORMATS[name].read(folder, root)
    except UserError as error:
        if str(folder) in str(error):
            raise
        raise UserError(f"{folder}: {error}") from error  # from the constructor of the SAE
    except Exception as error:  # a truncated or edited file can lead to any of them
        raise damaged(folder, error) from error
    for tensor_name, tensor in sae.sae.state_dict().items():
        if not tensor.isfinite().all():
            raise damaged(folder, f"{tensor_name} contains NaN or infinite values")
    return replace(sae, folder=folder, format=name, trained_on=our_training_text(folder))


def _check(saes: Sequence[ImportedSAE], path: Path, at: ReadAt) -> None:
    """Raise UserError unless the SAEs fit the language model, one for each layer."""
    owner: dict[int, Path] = {}
    for sae in saes:
        for layer in sae.layers:
            if layer in owner:
                raise UserError(
                    f"layer {layer} has two SAEs in {path}, {_relative(owner[layer], path)} and "
                    f"{_relative(sae.folder, path)}: choose with only=[...]."
                )
            if not 0 <= layer < at.num_layers:
                raise UserError(
                    f"{sae.folder} is for layer {layer}, but the model has {at.num_layers} "
                    f"layers, 0 to {at.num_layers - 1}: name its model by model=..."
                )
            owner[layer] = sae.folder
        place = sae.place
        for name, theirs, ours, option in (
            ("d_model", sae.sae.d_model, at.d_model, "model=<the model it was trained on>"),
            ("stack", place.stack or at.stack, at.stack, f"model.stack={place.stack}"),
            ("hookpoint", place.hookpoint or at.hookpoint, at.hookpoint, place.options()),
        ):
            if theirs != ours:
                raise UserError(
                    f"{sae.folder} has {name} {theirs}, but the model is read with {name} {ours}: "
                    f"give {option}."
                )
        read = None if at.modules is None else at.modules[place.layer]
        if place.module and read and not same_output(place.module, read):
            raise UserError(
                f"{sae.folder} is for the output of {place.module}, but that of {read} is read: "
                f"give {place.options()}, or name its model by model=..."
            )
