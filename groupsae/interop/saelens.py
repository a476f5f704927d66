"""SAELens' folder: `cfg.json` and `sae_weights.safetensors` (read and written as 6.54 does)."""

import json
import re
from pathlib import Path
from typing import Any

from groupsae.files.reading import require_json
from groupsae.files.tensors import read_tensors
from groupsae.interop.library import (
    ImportedSAE,
    Library,
    Origin,
    Place,
    imported_sae,
    kind_of,
    our_place,
    our_tensors,
    portable_tensors,
    subtract_b_dec,
    their_tensors,
    unknown_layer,
    write_tensors,
)
from groupsae.lm.hookpoints import HOOKPOINTS
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
    "gated": "gated",
}
READS = {"topk": "topk", "jumprelu": "jumprelu", "standard": "relu", "gated": "gated"}
_SHARED = ("W_enc", "W_dec", "b_dec")
TENSORS = {
    "topk": (*_SHARED, "b_enc"),
    "jumprelu": (*_SHARED, "b_enc", "threshold"),
    "standard": (*_SHARED, "b_enc"),
    "gated": (*_SHARED, "b_gate", "b_mag", "r_mag"),
}
TRANSPOSED = ("W_enc",)  # [d_in, d_sae]; the other names and shapes are ours
VERSION = "6.54.12"  # the tested one; files with a version below 6.0.0 are read differently
_HOOK = re.compile(r"^blocks\.(\d+)\.hook_(\w+)$")


def lens_hook(origin: Origin) -> str:
    """Return TransformerLens' name of a place: `blocks.4.hook_resid_post`."""
    return f"blocks.{origin.layer}.hook_{origin.hookpoint}"


def lens_model(name: str) -> str:
    """Return TransformerLens' name of a model on the Hub.

    Models of these organisations go by the last part of their id, others by the complete id.

    >>> lens_model("EleutherAI/pythia-160m-deduped"), lens_model("Qwen/Qwen2.5-0.5B")
    ('pythia-160m-deduped', 'Qwen/Qwen2.5-0.5B')
    """
    organisation, slash, last = name.rstrip("/").rpartition("/")
    short = organisation in ("EleutherAI", "openai-community", "google", "roneneldan")
    local = slash and ("/" in organisation or organisation in ("", ".", ".."))
    return last if short or local else name


def write(folder: Path, sae: SAE, origin: Origin) -> None:
    """Write an SAE that takes raw activations; weights as [d_in, d_sae] and [d_sae, d_in].

    BatchTopK and Matryoshka become `jumprelu` with one threshold for all latents, as SAELens
    itself saves them for inference.
    """
    kind, tensors = kind_of(sae), portable_tensors(sae)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(sae.d_sae)
    topk = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    config = {
        "architecture": ARCHITECTURES[kind],
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **topk,
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": lens_model(origin.model),
            "hook_name": lens_hook(origin),
            "hook_head_index": None,
            "context_size": origin.context,
            "prepend_bos": origin.prepend_bos,
            "groupsae": origin.to_json(),
        },
    }
    names = {name: name for name in TENSORS[ARCHITECTURES[kind]]}
    write_tensors(folder / WEIGHTS, their_tensors(tensors, names, TRANSPOSED))
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def recognises(folder: Path) -> bool:
    """Return whether this is a folder of SAELens."""
    return (folder / WEIGHTS).exists()


def read(folder: Path) -> ImportedSAE:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, or does what our SAEs cannot (scaling within, other kinds).
    """
    file = folder / CONFIG
    config = require_json(file)
    metadata = config.get("metadata") or {}
    known = our_place(metadata, file)
    architecture = _architecture(config, file)
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key) not in ("none", None):
            raise UserError(
                f"{file} has {key} = {config[key]!r}, which our SAEs do not do: fold it into the "
                f"weights with SAELens first, so that {key} is 'none'."
            )
    hook = metadata.get("hook_name") or config.get("hook_name")
    found = _HOOK.match(str(hook))
    if found is None or found[2] not in HOOKPOINTS:
        raise unknown_layer(file, hook, "its hook_name must be blocks.<number>.hook_<hookpoint>")
    names, weights = {name: name for name in TENSORS[architecture]}, folder / WEIGHTS
    tensors = our_tensors(read_tensors(weights), names, TRANSPOSED, weights)
    if not config.get("apply_b_dec_to_input", True):
        tensors = subtract_b_dec(tensors)
    before = config.get("activation_fn_kwargs") or {}  # before version 6
    arguments = {"k": config.get("k", before.get("k"))} if architecture == "topk" else {}
    model = metadata.get("model_name") or config.get("model_name")
    place = Place(int(found[1]), found[2], known and known.stack, model)
    by_norm = bool(config.get("rescale_acts_by_decoder_norm", False))
    return imported_sae(READS[architecture], tensors, place, arguments, by_norm=by_norm)


def _architecture(config: dict[str, Any], file: Path) -> str:
    name = config.get("architecture", "standard")
    if name == "standard" and str(config.get("activation_fn_str", "relu")) == "topk":
        return "topk"  # before version 6
    if name not in READS:
        raise UserError(
            f"{file} has the architecture {name!r}. Of SAELens' architectures, these can be "
            f"read: {', '.join(READS)}. (jumprelu includes saved batchtopk and matryoshka.)"
        )
    return str(name)


SNIPPET = """from sae_lens import SAE

sae = SAE.from_pretrained(release="{repo}", sae_id="{folder}")"""
SAELENS = Library("saelens", ARCHITECTURES, lens_hook, write, recognises, read, SNIPPET)
