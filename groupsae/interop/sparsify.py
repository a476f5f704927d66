"""sparsify's folder: `cfg.json` and `sae.safetensors` (as 1.3.3 reads and writes them)."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groupsae.files.reading import require_json
from groupsae.files.tensors import read_tensors
from groupsae.interop.library import (
    ImportedSAE,
    Library,
    Origin,
    Tensors,
    imported_sae,
    our_place,
    our_tensors,
    parse_module_path,
    portable_tensors,
    their_tensors,
    unknown_place,
    write_tensors,
)
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
DEFAULT_K = 32  # of a configuration that does not name k
# Keys that decide what an SAE computes -> the value that ours can do.
PLAIN = {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False}


def folder_name(origin: Origin) -> str:
    """Return the name of an SAE's folder: the path of the module.

    Raises:
        UserError: no module has this output, or the run does not name the module.
    """
    if origin.module is not None:
        return origin.module
    if origin.hookpoint == "resid_pre" and origin.layer == 0:
        reason = "resid_pre of layer 0 is not the output of a module"
    else:
        reason = f"cfg.json of {origin.group} does not name the module of layer {origin.layer}"
    raise UserError(
        f"{reason}, and format=sparsify names modules: use format=saelens or dictionary_learning."
    )


def write(folder: Path, sae: SAE, origin: Origin) -> None:
    """Write a TopK SAE that takes raw activations; both weights are [num_latents, d_in]."""
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
        "groupsae": origin.to_json(),
    }
    write_tensors(folder / WEIGHTS, their_tensors(portable_tensors(sae), NAMES, ()))
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def recognises(folder: Path) -> bool:
    """Return whether this is a folder of sparsify (or of the paper's code, its descendant)."""
    file = folder / CONFIG
    return (folder / WEIGHTS).exists() and file.exists() and "d_in" in require_json(file)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an SAE.

    Raises:
        UserError: it is damaged, or names what our SAEs cannot do (transcoders, GroupMax).
    """
    file = folder / CONFIG
    config = require_json(file)
    for key, plain in PLAIN.items():
        if config.get(key, plain) != plain:
            raise UserError(
                f"{file} has {key} = {config[key]!r}. Of sparsify's SAEs, only those with "
                f"{key} = {json.dumps(plain)} can be read."
            )
    return {"k": DEFAULT_K, **config}


def read(folder: Path, names: Sequence[str]) -> ImportedSAE:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, does what our SAEs cannot, or does not name its place.
    """
    config = read_config(folder)
    # several seeds are in <hookpoint>/seed<n>
    name = next((name for name in names if not name.startswith("seed")), names[0])
    place = our_place(config, folder / CONFIG) or parse_module_path(name)
    if place is None:
        advice = "rename it to layers.<number> or to the path of its module, layers.<number>.mlp"
        if name.startswith("seed"):
            advice = "give the folder above it as saes=, and choose with only=[*/seed0]"
        raise unknown_place(folder, name, advice)
    return imported_sae("topk", read_weights(folder), place, {"k": config["k"]})


def read_weights(folder: Path, *more: str) -> Tensors:
    """Return the tensors of a folder by our names; `more` tensors keep theirs."""
    names, weights = NAMES | {name: name for name in more}, folder / WEIGHTS
    return our_tensors(read_tensors(weights), names, (), weights)


def load(folder: Path) -> Any:
    """Return sparsify's own object, a `SparseCoder`."""
    return importlib.import_module("sparsify").SparseCoder.load_from_disk(folder)


SNIPPET = """from sparsify import SparseCoder

sae = SparseCoder.load_from_hub("{repo}", hookpoint="{folder}")"""
SPARSIFY = Library(
    "sparsify",
    {"topk": "topk"},
    folder_name,
    write,
    recognises,
    read,
    SNIPPET,
    "eai-sparsify",
    load,
)
