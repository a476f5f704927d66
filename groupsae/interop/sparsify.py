"""sparsify's folder: `cfg.json` and `sae.safetensors` (as 1.3.3 reads and writes them)."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from groupsae.files.reading import require_json
from groupsae.interop.format import (
    About,
    Format,
    Incoming,
    Known,
    known_place,
    wrong_place,
)
from groupsae.interop.names import parse_module_path
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.suite.tensors import number, read_tensors, take

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
HOLDS = {"topk": "topk"}
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def folder_name(about: About) -> str:
    """Return the name of an SAE's folder: the path of the module.

    Raises:
        UserError: no module puts this out, or it is not known which.
    """
    if about.module is not None:
        return about.module
    if about.hookpoint == "resid_pre" and about.layer == 0:
        reason = "resid_pre of layer 0 is no module's output"
    else:
        reason = f"the cfg.json of {about.group} does not name the module of layer {about.layer}"
    raise UserError(
        f"{reason}, and format=sparsify names modules: use format=saelens or dictionary_learning."
    )


def write(folder: Path, sae: SAE, about: About) -> None:
    """Write a TopK SAE that takes raw activations; weights are [num_latents, d_in] both."""
    state = {name: tensor.detach().float().cpu() for name, tensor in sae.state_dict().items()}
    tensors = {theirs: state[ours].contiguous().clone() for theirs, ours in NAMES.items()}
    config = {
        "activation": "topk",
        "expansion_factor": max(1, round(sae.d_sae / sae.d_model)),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
        "groupsae": about.to_json(),
    }
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def mine(folder: Path) -> bool:
    """Return whether this is a folder of sparsify (or of the paper's code, which began as one)."""
    file = folder / CONFIG
    return (folder / WEIGHTS).exists() and file.exists() and "d_in" in require_json(file)


def read(folder: Path) -> Incoming:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, or does what our SAEs cannot (transcoders, GroupMax).
    """
    file = folder / CONFIG
    config = require_json(file)
    for key, plain in (("activation", "topk"), ("transcode", False), ("skip_connection", False)):
        if config.get(key, plain) != plain:
            raise UserError(
                f"{file} has {key} = {config[key]!r}; of sparsify's only plain SAEs with "
                f"{key} = {json.dumps(plain)} can be read."
            )
    known = known_place(config, file)
    layer, hookpoint = _place(folder, known)
    tensors = ours(folder, config)
    return Incoming.of(
        "topk",
        tensors,
        sized={"k": number(config, "k", file, latents=len(tensors["b_enc"]))},
        folder=folder,
        format="sparsify",
        norm_factors={layer: 1.0},
        hookpoint=hookpoint,
        stack=known.stack if known else None,
        model=known.model if known else None,
    )


def ours(folder: Path, config: dict[str, Any], *more: str) -> dict[str, Tensor]:
    """Return the tensors of a folder by our names.

    Args:
        folder: with the weights.
        config: its `cfg.json`.
        *more: further tensors [num_latents], which keep their names.
    """
    file = folder / CONFIG
    d = number(config, "d_in", file)
    # 0 means: the factor says how many
    n = config.get("num_latents") or d * number(config, "expansion_factor", file)
    shapes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    wanted = {theirs: shapes[ours] for theirs, ours in NAMES.items()}
    wanted |= dict.fromkeys(more, (n,))
    tensors = take(read_tensors(folder / WEIGHTS), wanted, folder / WEIGHTS)
    return {NAMES.get(theirs, theirs): tensor for theirs, tensor in tensors.items()}


def _place(folder: Path, known: Known | None) -> tuple[int, str]:
    if known is not None:
        return known.layer, known.hookpoint
    # several seeds are <hookpoint>/seed<n>
    name = folder.parent.name if folder.name.startswith("seed") else folder.name
    place = parse_module_path(name)
    if place is None:
        raise wrong_place(folder, name, "name the folder layers.<number>, or by its module's path")
    return place


SPARSIFY = Format(
    name="sparsify",
    library="sparsify",
    holds=HOLDS,
    folder=folder_name,
    write=write,
    mine=mine,
    read=read,
)
