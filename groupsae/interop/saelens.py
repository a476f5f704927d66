"""SAELens' folder: `cfg.json` and `sae_weights.safetensors` (read and written as 6.54 does)."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from groupsae.files.reading import require_json
from groupsae.interop.fold import subtract_b_dec
from groupsae.interop.format import About, Format, Incoming, known_place, wrong_place
from groupsae.interop.names import lens_hook, lens_model, parse_lens_hook
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.suite.build import kind_of
from groupsae.suite.tensors import number, read_tensors, section, take

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HOLDS = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "relu": "standard",
    "gated": "gated",
}
READS = {"topk": "topk", "jumprelu": "jumprelu", "standard": "relu", "gated": "gated"}
VERSION = "6.54.12"  # that the files were checked with; below 6.0.0 they would be read otherwise


def folder_name(about: About) -> str:
    """Return the name of an SAE's folder, TransformerLens' name of the place."""
    return lens_hook(about.hookpoint, about.layer)


def write(folder: Path, sae: SAE, about: About) -> None:
    """Write an SAE that takes raw activations; weights as [d_in, d_sae] and [d_sae, d_in].

    BatchTopK and Matryoshka become `jumprelu` with one threshold for all latents, as SAELens
    itself saves them for inference.
    """
    state = {name: tensor.detach().float().cpu() for name, tensor in sae.state_dict().items()}
    tensors: dict[str, Tensor] = {**state, "W_enc": state["W_enc"].T}
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    elif "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(sae.d_sae)
    config: dict[str, Any] = {
        "architecture": HOLDS[kind_of(sae)],
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if kind_of(sae) == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    config["metadata"] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": lens_model(about.model),
        "hook_name": lens_hook(about.hookpoint, about.layer),
        "hook_head_index": None,
        "context_size": about.context,
        "prepend_bos": about.prepend_bos,
        "groupsae": about.to_json(),
    }
    (folder / WEIGHTS).write_bytes(save({n: t.contiguous().clone() for n, t in tensors.items()}))
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def mine(folder: Path) -> bool:
    """Return whether this is a folder of SAELens."""
    return (folder / WEIGHTS).exists()


def read(folder: Path) -> Incoming:
    """Return the SAE in a folder.

    Raises:
        UserError: it is damaged, or does what our SAEs cannot (scaling within, other kinds).
    """
    file = folder / CONFIG
    config = require_json(file)
    metadata = section(config, "metadata", file)
    known = known_place(metadata, file)
    name = _architecture(config, file)
    for key, plain in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(key, plain) not in (plain, None):
            raise UserError(
                f"{file} has {key} = {config[key]!r}, which is no part of an SAE here: fold it "
                f"into the weights with SAELens first, so that it says {plain!r}."
            )
    named = metadata.get("hook_name") or config.get("hook_name")
    place = parse_lens_hook(named)
    if place is None:
        raise wrong_place(file, named, "its hook_name must be blocks.<number>.hook_<hookpoint>")
    d, n = number(config, "d_in", file), number(config, "d_sae", file)
    wanted = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)}
    biases = ("b_gate", "b_mag", "r_mag") if name == "gated" else ("b_enc",)
    wanted |= {each: (n,) for each in (*biases, *(["threshold"] if name == "jumprelu" else []))}
    tensors = take(read_tensors(folder / WEIGHTS), wanted, folder / WEIGHTS)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if not config.get("apply_b_dec_to_input", True):
        tensors = subtract_b_dec(tensors)
    kind = READS[name]
    by_norm = bool(config.get("rescale_acts_by_decoder_norm", False))
    return Incoming.of(
        kind,
        tensors,
        sized={"k": _k(config, file, n)} if kind == "topk" else {},
        by_norm=by_norm,
        folder=folder,
        format="saelens",
        norm_factors={place[0]: 1.0},
        hookpoint=place[1],
        stack=known.stack if known else None,
        model=metadata.get("model_name") or config.get("model_name"),
    )


def _architecture(config: dict[str, Any], file: Path) -> str:
    name = config.get("architecture", "standard")
    if name == "standard" and str(config.get("activation_fn_str", "relu")) == "topk":
        return "topk"  # before version 6
    if name not in READS:
        raise UserError(
            f"{file} has the architecture {name!r}; of SAELens' these can be read: "
            f"{', '.join(READS)} (batchtopk and matryoshka once saved for inference, as jumprelu)."
        )
    return str(name)


def _k(config: dict[str, Any], file: Path, d_sae: int) -> int:
    before = section(config, "activation_fn_kwargs", file)  # before version 6
    return number({"k": config.get("k", before.get("k"))}, "k", file, latents=d_sae)


SAELENS = Format(
    name="saelens",
    library="saelens",
    holds=HOLDS,
    folder=folder_name,
    write=write,
    mine=mine,
    read=read,
)
