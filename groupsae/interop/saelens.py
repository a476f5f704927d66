"""SAELens' folder: `cfg.json` and `sae_weights.safetensors` (read and written as 6.54 does)."""

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from groupsae.files.reading import require_json
from groupsae.files.tensors import read_tensors
from groupsae.interop.library import (
    ImportedSAE,
    Library,
    Origin,
    Place,
    agreed_place,
    imported_sae,
    kind_of,
    our_place,
    our_tensors,
    parse_module_path,
    portable_tensors,
    subtract_b_dec,
    their_tensors,
    unknown_place,
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
RENAMED = {  # keys before version 6
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# Keys that decide what an SAE computes -> the values that ours can do. (`_architecture`, `_k` and
# `read` handle the others; keys that are not known do not change it.)
PLAIN: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", False, None),
    "reshape_activations": ("none", None),
    "hook_head_index": (None,),  # one head alone
    "hook_name_out": (None,),  # a transcoder
}
FOLD = {  # value of a key -> the way out
    "expected_average_only_in": " (SAELens' from_pretrained folds the factor of a published SAE "
    "into the weights: load it there, and read what its save_model writes.)"
}
DEFAULT_K = 100  # of a configuration that does not name k
# Keys that decide which activations it was trained on -> the values that need no note.
TRAINED_ON: dict[str, tuple[Any, ...]] = {
    "context_size": (None,),
    "prepend_bos": (None,),
    "exclude_special_tokens": (False, None),
    "seqpos_slice": ([None], [None, None], None),
    "model_from_pretrained_kwargs": ({}, {"center_writing_weights": False}, None),
}


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


def config_of(sae: SAE, origin: Origin) -> dict[str, Any]:
    """Return the `cfg.json` of an SAE that takes raw activations."""
    kind = kind_of(sae)
    topk = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    return {
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


def write(folder: Path, sae: SAE, origin: Origin) -> None:
    """Write an SAE that takes raw activations; weights as [d_in, d_sae] and [d_sae, d_in].

    BatchTopK and Matryoshka become `jumprelu` with one threshold for all latents, as SAELens
    itself saves them for inference.
    """
    tensors, config = portable_tensors(sae), config_of(sae, origin)
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(sae.d_sae)
    names = {name: name for name in TENSORS[config["architecture"]]}
    write_tensors(folder / WEIGHTS, their_tensors(tensors, names, TRANSPOSED))
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def recognises(folder: Path) -> bool:
    """Return whether this is a folder of SAELens."""
    return (folder / WEIGHTS).exists()


def read(folder: Path, names: Sequence[str]) -> ImportedSAE:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, contradicts itself, or does what our SAEs cannot (scaling
            within, other kinds).
    """
    file, weights = folder / CONFIG, folder / WEIGHTS
    config = _flat(require_json(file), file)
    ours = our_place(config, file)
    architecture = _architecture(config, file)
    for key, values in PLAIN.items():
        if config.get(key) not in values:
            raise UserError(
                f"{file} has {key} = {config[key]!r}, which our SAEs do not do: only those with "
                f"{key} = {json.dumps(values[0])} can be read.{FOLD.get(config[key], '')}"
            )
    place = ours or _place(folder, config, names[0])._replace(model=config.get("model_name"))
    stored = read_tensors(weights)
    factor = stored.pop("scaling_factor", stored.pop("finetuning_scaling_factor", None))
    tensors = our_tensors(stored, {n: n for n in TENSORS[architecture]}, TRANSPOSED, weights)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        if not config.get("finetuning_scaling_factor"):
            raise UserError(
                f"{weights} has a scaling_factor other than 1, and {CONFIG} does not have "
                "finetuning_scaling_factor = true, which would use it: correct one of the two."
            )
        tensors["W_dec"] = tensors["W_dec"] * factor.float().unsqueeze(1)
    if not config.get("apply_b_dec_to_input", True):
        tensors = subtract_b_dec(tensors)
    return imported_sae(
        READS[architecture],
        tensors,
        place,
        {"k": _k(config)} if architecture == "topk" else {},
        by_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
        notes=[] if ours else _differences(config),
    )


def _flat(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the values of `metadata` and those around it, by their names in version 6."""
    found: dict[str, Any] = {}
    for key, value in [*config.items(), *(config.get("metadata") or {}).items()]:
        name = RENAMED.get(key, key)
        if value is not None and found.setdefault(name, value) != value:
            raise UserError(
                f"{file} contradicts itself: its {key} is {value!r}, and another spelling of it "
                f"is {found[name]!r}. Remove the one that is wrong."
            )
    return found


def _is_old(config: dict[str, Any]) -> bool:
    """Return whether SAELens reads this as a configuration from before version 6."""
    return int(str(config.get("sae_lens_version") or 0).split(".")[0]) < 6


def _architecture(config: dict[str, Any], file: Path) -> str:
    """Return the kind that SAELens loads, a key of `READS`.

    Raises:
        UserError: we have no such kind, or the activation function is that of another one, which
            SAELens 6 would replace by ReLU.
    """
    name, function = config.get("architecture"), config.get("activation_fn")
    if _is_old(config):
        old = config.get("activation_fn_kwargs") or {}
        if name in (None, "standard") and function == "topk" and old.get("k") is not None:
            name = "topk"
        if name is None and (function is not None or "k" not in {*config, *old}):
            name = "standard"
    if name not in READS:
        raise UserError(
            f"{file} has the architecture {name!r}. Of SAELens' architectures, these can be "
            f"read: {', '.join(READS)}. (jumprelu includes saved batchtopk and matryoshka.)"
        )
    if function not in (None, "relu", name):
        raise UserError(
            f"{file} has activation_fn = {function!r} in the architecture {name!r}, and ours has "
            'ReLU there. If it is a TopK SAE, correct it to architecture = "topk" and its k.'
        )
    return str(name)


def _k(config: dict[str, Any]) -> Any:
    old = (config.get("activation_fn_kwargs") or {}).get("k") if _is_old(config) else None
    return config.get("k", DEFAULT_K) if old is None else old


def _place(folder: Path, config: dict[str, Any], name: str) -> Place:
    hook, layer = config.get("hook_name"), config.get("hook_layer")
    place = None if hook is None else parse_hook(str(hook).replace("{layer}", str(layer)))
    if hook is None or place is not None:  # the folder's name does not replace an unknown hook
        named = {f"hook_name in {CONFIG}": place, "folder's name": parse_hook(name)}
        layer_only = {f"hook_layer in {CONFIG}": Place(layer) if isinstance(layer, int) else None}
        place = agreed_place(folder, named | layer_only)
    if place is None or place.hookpoint is place.module is None:
        advice = "its hook_name must be blocks.<number>.hook_<hookpoint>, with one of "
        advice += f"{', '.join(HOOKPOINTS)}, or the path of a module, such as transformer.h.4"
        raise unknown_place(folder / CONFIG, hook, advice)
    return place


def parse_hook(name: str) -> Place | None:
    """Return the place of a hook of TransformerLens, or of a module of the Hugging Face model."""
    found = _HOOK.match(name)
    if found is not None and found[2] in HOOKPOINTS:
        return Place(int(found[1]), found[2])
    return None if "hook_" in name else parse_module_path(name)


def _differences(config: dict[str, Any]) -> list[str]:
    """Return a note on the activations that the SAE was trained on, as far as that is known."""
    old = _is_old(config)
    found = {"prepend_bos": True, **config} if old else config
    trained = [
        f"{key}={json.dumps(found[key])}"
        for key, silent in TRAINED_ON.items()
        if found.get(key) not in silent
    ]
    lens = config.get("model_class_name", "HookedTransformer") == "HookedTransformer"
    if old and lens and "model_from_pretrained_kwargs" not in config:  # versions 1 and 2
        trained.append("a residual stream that TransformerLens may have centred")
    if not trained:
        return []
    return [
        f"it was trained with {', '.join(trained)}: this is not checked. stream.context, "
        "stream.prepend_bos and the other keys of stream set the activations of an evaluation"
    ]


def load(folder: Path) -> Any:
    """Return SAELens' own object, a `sae_lens.SAE`."""
    return importlib.import_module("sae_lens").SAE.load_from_disk(str(folder))


SNIPPET = """from sae_lens import SAE

sae = SAE.from_pretrained(release="{repo}", sae_id="{folder}")"""
SAELENS = Library(
    "saelens", ARCHITECTURES, lens_hook, write, recognises, read, SNIPPET, "sae-lens", load
)
