"""dictionary_learning's folder: `config.json` and `ae.pt` (as 0.1.0 reads and writes them)."""

import importlib
import json
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupsae.files.reading import require_json
from groupsae.interop.library import (
    TOPK_KINDS,
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
    read_pickled,
    subtract_b_dec,
    their_tensors,
    unknown_place,
)
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.sae.matryoshka import Matryoshka

CONFIG, WEIGHTS = "config.json", "ae.pt"
CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}
TRAINERS = {
    "topk": "TopKTrainer",
    "batchtopk": "BatchTopKTrainer",
    "matryoshka": "MatryoshkaBatchTopKTrainer",
    "jumprelu": "JumpReluTrainer",
    "relu": "StandardTrainer",
    "gated": "GatedSAETrainer",
}
READS = {name: kind for kind, name in CLASSES.items()} | {"AutoEncoderNew": "relu"}
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# Our name -> theirs.
NAMES: dict[str, dict[str, str]] = {
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "threshold": "threshold"},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "threshold"},
    "AutoEncoder": {**_LINEAR, "b_dec": "bias"},
    "AutoEncoderNew": {**_LINEAR, "b_dec": "decoder.bias"},
    "GatedAutoEncoder": {
        "W_enc": "encoder.weight",
        "W_dec": "decoder.weight",
        "b_dec": "decoder_bias",
        "b_gate": "gate_bias",
        "b_mag": "mag_bias",
        "r_mag": "r_mag",
    },
}
TRANSPOSED = ("decoder.weight", "W_enc")  # [d_model, d_sae] in their files
ENCODES_X = ("JumpReluAutoEncoder", "AutoEncoderNew")  # and not x - b_dec
NO_WEIGHTS = {  # further tensors of a class, which are not weights of ours
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}
# Places in submodule_name and in names of folders -> hookpoint.
PLACES = {
    **dict.fromkeys(("resid_post", "resid_out", "resid", "residual"), "resid_post"),
    **dict.fromkeys(("resid_pre", "resid_in"), "resid_pre"),
    **dict.fromkeys(("mlp_out", "mlp_output", "mlp"), "mlp_out"),
    **dict.fromkeys(("attn_out", "attn_output", "attn"), "attn_out"),
    **dict.fromkeys(("attention_out", "attention_output", "attention"), "attn_out"),
}
_PLACE = rf"(?P<place>{'|'.join(PLACES)})"
_SPELLINGS = (
    rf"{_PLACE}(_?(layer|l)?_?(?P<layer>\d+))?",  # mlp, mlp1, mlp_out_layer1, resid_post_layer_3
    rf"(layer|l)_?(?P<layer>\d+)[_.]{_PLACE}",  # layer_3_resid_post, layer3.mlp
    r".*(?<![a-z])(?P<place>(resid_(post|pre)|(mlp|attn|attention)_out))_layer_(?P<layer>\d+)(_.*)?",
)


def folder_name(origin: Origin) -> str:
    """Return the name of an SAE's folder, as in the library's recipes: `resid_post_layer_4`."""
    return f"{origin.hookpoint}_layer_{origin.layer}"


def parse_name(name: str, layer: int | None = None) -> Place | None:
    """Return the place that a name means, in `layer` where it has no number; None if unknown.

    >>> parse_name("mlp_out_layer1")[:2], parse_name("attn", 3)[:2], parse_name("layers[2]")[:2]
    ((1, 'mlp_out'), (3, 'attn_out'), (2, 'resid_post'))
    """
    matches = (re.fullmatch(pattern, name, re.IGNORECASE) for pattern in _SPELLINGS)
    found = next((match for match in matches if match), None)
    if found is None:
        return parse_module_path(name.replace("[", ".").replace("]", ""))
    number = layer if found["layer"] is None else int(found["layer"])
    return None if number is None else Place(number, PLACES[found["place"].lower()])


def write(folder: Path, sae: SAE, origin: Origin) -> None:
    """Write an SAE that takes raw activations; tensors only, so the pickle holds no code."""
    kind, ours = kind_of(sae), portable_tensors(sae)
    name = CLASSES[kind]
    if name in ENCODES_X:
        ours = subtract_b_dec(ours, sign=-1)
    tensors = their_tensors(ours, NAMES[name], TRANSPOSED)
    more: dict[str, Any] = {}
    if kind in TOPK_KINDS:
        more["k"] = sae.k
        tensors["k"] = torch.tensor(sae.k, dtype=torch.int)
        tensors.setdefault("threshold", torch.tensor(-1.0))  # unset: topk chooses by k
    if kind == "matryoshka":
        assert isinstance(sae, Matryoshka)
        sizes = [large - small for small, large in pairwise([0, *sae.sizes])]
        more["group_fractions"] = [size / sae.d_sae for size in sizes]
        tensors["group_sizes"] = torch.tensor(sizes)
    metadata = origin.to_json()
    trainer = {
        "dict_class": name,
        "trainer_class": TRAINERS[kind],
        "activation_dim": sae.d_model,
        "dict_size": sae.d_sae,
        **more,
        "layer": origin.layer,
        "lm_name": metadata["model"],
        "submodule_name": folder_name(origin),
    }
    buffer = {"d_submodule": sae.d_model, "ctx_len": origin.context}
    config = {"trainer": trainer, "buffer": buffer, "groupsae": metadata}
    torch.save(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def recognises(folder: Path) -> bool:
    """Return whether this is a folder of dictionary_learning."""
    return (folder / WEIGHTS).exists()


def read(folder: Path, names: Sequence[str]) -> ImportedSAE:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, holds code, contradicts itself, has an unknown class or place, or
            is a BatchTopK without its threshold.
    """
    file, weights = folder / CONFIG, folder / WEIGHTS
    config = require_json(file)
    trainer = config.get("trainer") or {}
    name = trainer.get("dict_class")
    if name not in READS:
        raise UserError(
            f"{file} has the dict_class {name!r}. Of dictionary_learning's classes, these can be "
            f"read: {', '.join(READS)}."
        )
    place, notes = _place(folder, config, names)
    stored = read_pickled(weights)
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise UserError(f"{weights} does not hold a state dict (a dict of tensors by name).")
    others = {key: stored.pop(key) for key in NO_WEIGHTS.get(name, ()) if key in stored}
    scalars = () if name == "JumpReluAutoEncoder" else ("threshold",)
    tensors = our_tensors(stored, NAMES[name], TRANSPOSED, weights, scalars=scalars)
    kind = READS[name]
    arguments: dict[str, Any] = {}
    if kind in TOPK_KINDS:
        arguments["k"] = int(others["k"]) if "k" in others else trainer.get("k")
        if trainer.get("k", arguments["k"]) != arguments["k"]:
            raise UserError(
                f"{folder} contradicts itself: k is {trainer['k']} in {CONFIG} and "
                f"{arguments['k']} in {WEIGHTS}. Correct the one in {CONFIG} if it is wrong."
            )
    if kind == "matryoshka":
        d_sae, sizes = len(tensors["W_dec"]), others["group_sizes"].tolist()
        arguments["prefixes"] = [end / d_sae for end in accumulate(sizes)]
    if kind in ("batchtopk", "matryoshka") and float(tensors["threshold"]) < 0:
        raise UserError(
            f"{weights} has no threshold (its value is {float(tensors['threshold']):g}, which "
            "stands for unset). A BatchTopK SAE cannot encode without one: use a later checkpoint."
        )
    if name in ENCODES_X:
        tensors = subtract_b_dec(tensors)
    return imported_sae(kind, tensors, place, arguments, notes=notes)


def _place(folder: Path, config: dict[str, Any], names: Sequence[str]) -> tuple[Place, list[str]]:
    """Return the place that the configuration names, or the folder where it names none; notes.

    Raises:
        UserError: none is known, or two contradict each other.
    """
    trainer, io = config["trainer"], (config.get("buffer") or {}).get("io") or "out"
    layer = trainer["layer"] if isinstance(trainer.get("layer"), int) else None
    name = trainer.get("submodule_name") or None
    of_config = None if name is None else parse_name(str(name), layer)
    named = {f"submodule_name in {CONFIG}": of_config}
    below = names[:-1] or names  # names[-1] is the folder that was searched
    named |= {f"folder's name {each}": parse_name(each) for each in below}
    named |= {f"layer in {CONFIG}": None if layer is None else Place(layer)}
    place = our_place(config, folder / CONFIG) or agreed_place(folder, named)
    unnamed = place is not None and place.hookpoint is place.module is None
    if place is None or (unnamed and name is not None):
        advice = f"correct submodule_name in {CONFIG} to <hookpoint>_layer_<number>, such as "
        advice += "mlp_out_layer_3, or to the path of a module, or give the folder such a name"
        raise unknown_place(folder, name, advice)
    if io != "out" and place.hookpoint != "resid_pre":
        raise UserError(
            f"{folder / CONFIG} has io = {io!r}, and our SAEs encode outputs of modules. (If it "
            "encodes the input of a block, correct submodule_name to resid_pre_layer_<number>.)"
        )
    notes = []
    if unnamed:
        notes = [f"{CONFIG} names layer {layer} and no submodule: model.hookpoint decides"]
    elif name is not None and of_config is None:
        notes = [f"its submodule_name {name!r} is not known: the name of its folder decides"]
    return place._replace(model=trainer.get("lm_name")), notes


def load(folder: Path) -> Any:
    """Return dictionary_learning's own object, such as an `AutoEncoderTopK`."""
    utils = importlib.import_module("dictionary_learning.utils")
    return utils.load_dictionary(str(folder), device="cpu")[0]


SNIPPET = """from dictionary_learning.utils import load_dictionary
from huggingface_hub import snapshot_download

path = snapshot_download("{repo}", allow_patterns="{folder}/*")
sae, config = load_dictionary(path + "/{folder}", device="cpu")"""
DICTIONARY_LEARNING = Library(
    "dictionary_learning",
    CLASSES,
    folder_name,
    write,
    recognises,
    read,
    SNIPPET,
    "dictionary-learning",
    load,
)
