"""dictionary_learning's folder: `config.json` and `ae.pt` (as 0.1.0 reads and writes them)."""

import json
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupsae.files.reading import require_json
from groupsae.interop.fold import subtract_b_dec
from groupsae.interop.format import (
    About,
    Format,
    Incoming,
    Known,
    known_place,
    wrong_place,
)
from groupsae.interop.names import dictionary_name, parse_dictionary_name
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.sae.matryoshka import Matryoshka
from groupsae.suite.build import kind_of
from groupsae.suite.tensors import number, read_pickled, take

CONFIG, WEIGHTS = "config.json", "ae.pt"
HOLDS = {
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
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# Our name -> theirs. A decoder as `nn.Linear` is [d, n], an encoder as a plain parameter too.
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
READS = {name: kind for kind, name in HOLDS.items()} | {"AutoEncoderNew": "relu"}
WHOLE_INPUT = ("JumpReluAutoEncoder", "AutoEncoderNew")  # b_dec is not subtracted from the input
SET_ASIDE = {  # what an SAE has beside its tensors of our kinds
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}


def folder_name(about: About) -> str:
    """Return the name of an SAE's folder, as the library's recipes name them."""
    return dictionary_name(about.hookpoint, about.layer)


def write(folder: Path, sae: SAE, about: About) -> None:
    """Write an SAE that takes raw activations; tensors only, so that no code is in the pickle."""
    name = HOLDS[kind := kind_of(sae)]
    state = {key: tensor.detach().float().cpu() for key, tensor in sae.state_dict().items()}
    if kind == "jumprelu":
        state["threshold"] = state.pop("log_threshold").exp()
    if name in WHOLE_INPUT:
        state = subtract_b_dec(state, sign=-1)
    tensors = {
        theirs: (state[ours].T if _transposed(theirs) else state[ours]).contiguous().clone()
        for ours, theirs in NAMES[name].items()
    }
    more: dict[str, Any] = {}
    if kind in ("topk", "batchtopk", "matryoshka"):
        more["k"] = sae.k
        tensors["k"] = torch.tensor(sae.k, dtype=torch.int)
        tensors.setdefault("threshold", torch.tensor(-1.0))  # unset: topk chooses by k
    if kind == "matryoshka":
        assert isinstance(sae, Matryoshka)
        sizes = [large - small for small, large in pairwise([0, *sae.sizes])]
        more["group_fractions"] = [size / sae.d_sae for size in sizes]
        tensors["group_sizes"] = torch.tensor(sizes)
    trainer = {
        "dict_class": name,
        "trainer_class": TRAINERS[kind],
        "activation_dim": sae.d_model,
        "dict_size": sae.d_sae,
        **more,
        "layer": about.layer,
        "lm_name": about.to_json()["model"],
        "submodule_name": folder_name(about),
    }
    buffer = {"d_submodule": sae.d_model, "ctx_len": about.context}
    config = {"trainer": trainer, "buffer": buffer, "groupsae": about.to_json()}
    torch.save(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def mine(folder: Path) -> bool:
    """Return whether this is a folder of dictionary_learning."""
    return (folder / WEIGHTS).exists()


def read(folder: Path) -> Incoming:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, holds code, is of a class that is not known, or is BatchTopK
            whose threshold was never set.
    """
    file, weights = folder / CONFIG, folder / WEIGHTS
    config = require_json(file)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    name = trainer.get("dict_class")
    if name not in READS:
        raise UserError(
            f"{file} has the dict_class {name!r}; of dictionary_learning's these can be read: "
            f"{', '.join(READS)}."
        )
    known = known_place(config, file)
    layer, hookpoint = _place(folder, known, trainer)
    stored = read_pickled(weights)
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise UserError(f"{weights} holds no state dict: expected tensors by name.")
    aside = {key: stored.pop(key) for key in SET_ASIDE.get(name, ()) if key in stored}
    tensors = _ours(name, stored, trainer, weights)
    kind, more = READS[name], _more(name, aside, trainer, len(tensors["W_dec"]), file)
    if kind in ("batchtopk", "matryoshka") and float(tensors["threshold"]) < 0:
        raise UserError(
            f"{weights} has no threshold (it is {float(tensors['threshold']):g}): training ended "
            "before it was set, and a BatchTopK SAE is used with one."
        )
    if name in WHOLE_INPUT:
        tensors = subtract_b_dec(tensors)
    return Incoming.of(
        kind,
        tensors,
        sized=more,
        folder=folder,
        format="dictionary_learning",
        norm_factors={layer: 1.0},
        hookpoint=hookpoint,
        stack=known.stack if known else None,
        model=trainer.get("lm_name"),
    )


def _transposed(theirs: str) -> bool:
    return theirs in ("decoder.weight", "W_enc")


def _ours(
    name: str, stored: dict[str, Tensor], trainer: dict[str, Any], file: Path
) -> dict[str, Tensor]:
    encoder = stored.get(NAMES[name]["W_enc"])
    shape = [0, 0] if encoder is None or encoder.ndim != 2 else list(encoder.shape)
    n, d = shape[::-1] if NAMES[name]["W_enc"] == "W_enc" else shape
    n, d = trainer.get("dict_size") or n, trainer.get("activation_dim") or d
    wanted: dict[str, tuple[int, ...]] = {}
    for ours, theirs in NAMES[name].items():
        if ours in ("W_enc", "W_dec"):
            wanted[theirs] = (d, n) if _transposed(theirs) else (n, d)
        elif ours == "threshold" and name != "JumpReluAutoEncoder":
            wanted[theirs] = ()
        else:
            wanted[theirs] = (d,) if ours == "b_dec" else (n,)
    tensors = take(stored, wanted, file)
    return {
        ours: (tensors[theirs].T if _transposed(theirs) else tensors[theirs]).contiguous()
        for ours, theirs in NAMES[name].items()
    }


def _more(
    name: str, aside: dict[str, Tensor], trainer: dict[str, Any], d_sae: int, file: Path
) -> dict[str, Any]:
    """Return the arguments of our SAE that stand beside its weights."""
    if name not in SET_ASIDE:
        return {}
    stored = {"k": int(aside["k"]) if "k" in aside else trainer.get("k")}
    k = number(stored, "k", file, latents=d_sae)
    if name != "MatryoshkaBatchTopKSAE":
        return {"k": k}
    sizes = [int(size) for size in aside.get("group_sizes", torch.tensor([]))]
    if sum(sizes) != d_sae or min(sizes) < 1:
        raise UserError(
            f"{file.with_name(WEIGHTS)} has group_sizes {sizes}: they must be above 0 and add up "
            f"to its {d_sae} latents."
        )
    return {"k": k, "prefixes": [end / d_sae for end in accumulate(sizes)]}


def _place(folder: Path, known: Known | None, trainer: dict[str, Any]) -> tuple[int, str]:
    if known is not None:
        return known.layer, known.hookpoint
    named = trainer.get("submodule_name") or ""
    place = parse_dictionary_name(str(named)) or parse_dictionary_name(str(folder))
    if place is not None:
        return place
    if isinstance(trainer.get("layer"), int):
        return trainer["layer"], "resid_post"
    raise wrong_place(folder, named, "name the folder resid_post_layer_<number>")


DICTIONARY_LEARNING = Format(
    name="dictionary_learning",
    library="dictionary_learning",
    holds=HOLDS,
    folder=folder_name,
    write=write,
    mine=mine,
    read=read,
)
