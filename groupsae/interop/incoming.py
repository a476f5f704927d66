"""Reads the SAEs in a folder of another library and lays them out as a run of ours."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from groupsae import __version__
from groupsae.files.atomic import write_json
from groupsae.files.reading import damaged, read_json
from groupsae.grouping.partition import Partition
from groupsae.grouping.plan import GroupPlan, name_of
from groupsae.interop import group_sae
from groupsae.interop.format import Incoming
from groupsae.interop.formats import FORMATS
from groupsae.interop.names import lens_model
from groupsae.runtime.errors import UserError
from groupsae.suite.hub import looks_like_name
from groupsae.suite.suite import save_sae

GROUP_SAE = "group-sae"
READABLE = (*FORMATS, GROUP_SAE)
UNKNOWN = float("nan")  # diameter of a group whose distances nobody measured


def read_folder(
    path: Path,
    *,
    form: str | None,
    only: Sequence[str] | None,
    num_groups: int | None,
    num_layers: int,
    d_model: int,
    hookpoint: str,
    stack: str,
) -> list[Incoming]:
    """Return the SAEs in a folder and the folders in it, at most one for each layer.

    Args:
        path: of one SAE, or of many.
        form: one of `READABLE`; None: what the files look like.
        only: patterns of the folders to read, relative to the path, such as `layers.3`.
        num_groups: of the paper's checkpoints: the published partition into so many groups;
            None: one SAE a layer.
        num_layers: of the language model.
        d_model: width of its activations.
        hookpoint: that the language model is read at.
        stack: that is read, encoder or decoder.

    Raises:
        UserError: there are none, one is damaged or of another kind, they do not fit the
            language model, or two serve one layer.
    """
    found = dict(_recognised(path, form))
    if only is not None:
        found = {f: n for f, n in found.items() if any(fnmatch(_inside(f, path), p) for p in only)}
    if GROUP_SAE in found.values() and only is None:
        theirs = [folder for folder, name in found.items() if name == GROUP_SAE]
        kept = group_sae.choose(theirs, num_groups, num_layers)
        found = {f: n for f, n in found.items() if n != GROUP_SAE or f in kept}
    elif num_groups is not None:
        raise UserError(
            f"num_groups={num_groups} chooses among the paper's checkpoints, folders baseline and "
            f"cluster, and there are none in {path}"
            + ("." if only is None else " that only=[...] leaves to choose from.")
        )
    if not found and only is None and any(path.glob("**/groups.json")):
        raise UserError(
            f"{path} holds a run of groupsae itself: python -m groupsae.evaluate run=<run folder> "
            "takes it as it is."
        )
    if not found:
        wanted = f" that match only={list(only)}" if only is not None else ""
        raise UserError(
            f"no SAEs in {path}{wanted}: looked for folders of {', '.join(READABLE)} "
            "(sae_weights.safetensors, sae.safetensors or ae.pt beside its configuration)."
        )
    read = [_read(folder, name, num_layers) for folder, name in found.items()]
    _check(read, path, num_layers, d_model, hookpoint, stack)
    return [replace(each, folder=Path(_inside(each.folder, path))) for each in read]


def lay_out(
    run: Path,
    read: Sequence[Incoming],
    *,
    num_layers: int,
    facts: dict[str, Any],
    named: Path,
    source: str,
) -> None:
    """Write `saes/`, `groups.json` and `summary.json` of a run whose SAEs were trained elsewhere.

    What they were trained on is not known, so their `cfg.json` names neither text nor weights.

    Args:
        run: an existing folder.
        read: the SAEs.
        num_layers: of the language model.
        facts: of the language model and the text, for each `cfg.json`.
        named: what the folder will be called.
        source: where the SAEs were found.
    """
    for each in read:
        made = type(each.sae)
        origin = {
            "source": source,
            "folder": str(each.folder),
            "format": each.format,
            "notes": each.notes,
        }
        save_sae(
            run / "saes" / name_of(each.layers),
            each.sae,
            {
                "architecture": f"{made.__module__}.{made.__qualname__}",
                "arguments": each.arguments,
                "d_sae": each.sae.d_sae,
                "width": 1.0,
                "layers": each.layers,
                "norm_factors": each.norm_factors,
                **facts,
                "hookpoint": each.hookpoint,
                "weights": None,
                "text": None,
                "tokens": None,
                "adopted": origin,
                "groupsae": __version__,
            },
        )
    plan = plan_of(read, num_layers)
    names = {name_of(each.layers): each.layers for each in read}
    write_json(
        run / "groups.json",
        {
            "plan": plan.to_json(),
            "hash": plan.hash,
            "saes": names,
            "measured": {"model": facts["model"], "revision": facts["revision"]},
        },
    )
    summary = {
        "folder": str(named),
        "adopted": source,
        "groups": {},
        "chosen": list(names),
        "steps": 0,
        "groupsae": __version__,
    }
    write_json(run / "summary.json", summary)  # the last: it makes the run a finished one


def is_adopted(run: Path) -> bool:
    """Return whether a folder is a run that `lay_out` wrote."""
    return "adopted" in (read_json(run / "summary.json") or {})


def plan_of(read: Sequence[Incoming], num_layers: int) -> GroupPlan:
    """Return the plan of these SAEs; layers that none serves are in groups without an SAE.

    Raises:
        UserError: the layers of an SAE are not neighbours.
    """
    groups = {each.layers[0]: each.layers for each in read}
    served = {layer for layers in groups.values() for layer in layers}
    unserved = [layer for layer in range(num_layers) if layer not in served]
    ordered = [group for _, group in sorted({**groups, **{x: [x] for x in unserved}}.items())]
    diameters = [0.0 if len(group) == 1 else UNKNOWN for group in ordered]
    return GroupPlan(
        Partition(ordered, diameters, "adopted"), "group", num_layers, unserved=tuple(unserved)
    )


def _recognised(path: Path, form: str | None) -> Iterator[tuple[Path, str]]:
    """Yield the folders of SAEs, in order of their numbers, and their formats."""
    if not path.is_dir():
        raise UserError(
            f"saes={path}: there is no such folder. Name one, or a repository of the Hub as "
            f"saes=hf:{path if looks_like_name(str(path)) else 'owner/name'}."
        )
    for folder in sorted([path, *(p for p in path.rglob("*") if p.is_dir())], key=_by_number):
        if any(part.startswith(".") for part in folder.relative_to(path).parts):
            continue
        name = _format_of(folder)
        if name is not None and form is not None and name != form:
            both = {name, form} == {GROUP_SAE, "sparsify"}  # the same files but for the factors
            if not both:
                raise UserError(f"{folder} is a folder of {name}, not of format={form}.")
            name = form
        if name is not None:
            yield folder, name


def _format_of(folder: Path) -> str | None:
    if group_sae.mine(folder):
        return GROUP_SAE
    return next((name for name, each in FORMATS.items() if each.mine(folder)), None)


def _by_number(folder: Path) -> list[object]:
    parts: list[object] = []
    for part in folder.parts:
        parts += [[int(word) if word.isdigit() else 0, word] for word in part.split(".")]
    return parts


def _inside(folder: Path, path: Path) -> str:
    return folder.relative_to(path).as_posix() if folder != path else path.name


def _read(folder: Path, name: str, num_layers: int) -> Incoming:
    try:
        if name == GROUP_SAE:
            found = group_sae.read(folder, num_layers)
        else:
            found = FORMATS[name].read(folder)
    except UserError:
        raise
    except Exception as error:  # whatever a cut or edited file leads to
        raise damaged(folder, error) from error
    for tensor_name, tensor in found.sae.state_dict().items():
        if not tensor.isfinite().all():
            raise damaged(folder, f"{tensor_name} holds NaN or infinite values")
    return found


def _check(
    read: Sequence[Incoming],
    path: Path,
    num_layers: int,
    d_model: int,
    hookpoint: str,
    stack: str,
) -> None:
    owner: dict[int, Path] = {}
    for each in read:
        for layer in each.layers:
            if layer in owner:
                raise UserError(
                    f"layer {layer} has two SAEs in {path}, {_inside(owner[layer], path)} and "
                    f"{_inside(each.folder, path)}: choose with only=[...]."
                )
            if not 0 <= layer < num_layers:
                raise UserError(
                    f"{each.folder} is for layer {layer}, but the model has {num_layers} layers, "
                    f"0 to {num_layers - 1}: name the model it was trained on by model=..."
                )
            owner[layer] = each.folder
        if each.sae.d_model != d_model:
            raise UserError(
                f"{each.folder} takes activations of width {each.sae.d_model}, but the model's "
                f"are {d_model} wide: name the model it was trained on by model=..."
            )
        if each.hookpoint != hookpoint:
            raise UserError(
                f"{each.folder} is for {each.hookpoint}, but the model is read at {hookpoint}: "
                f"give model.hookpoint={each.hookpoint}."
            )
        if each.stack not in (None, stack):
            raise UserError(
                f"{each.folder} is for the {each.stack} of its model, but the {stack} is read: "
                f"give model.stack={each.stack}."
            )


def other_model(read: Sequence[Incoming], model: str) -> str | None:
    """Return the model that the folders name, if that is another one."""
    for each in read:
        named = None if each.model is None else str(each.model)
        if named is not None and lens_model(named) not in (lens_model(model), model):
            return named
    return None
