"""Folders as other libraries write them, from tensors by our names."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.shelf import D_MODEL as d
from tests.helpers.shelf import D_SAE as n
from tests.helpers.shelf import K


def saelens(folder: Path, tensors: dict[str, Tensor], layer: int = 4, **config: Any) -> Path:
    folder.mkdir(parents=True)
    stored = {**tensors, "W_enc": tensors["W_enc"].T.contiguous()}
    save_file(stored, folder / "sae_weights.safetensors")
    values = {
        "architecture": "standard", "d_in": d, "d_sae": n, "dtype": "float32",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "pythia-14m"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(values | config))
    return folder


def sparsify(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    stored = {names.get(name, name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "sae.safetensors")
    values = {"activation": "topk", "expansion_factor": 3, "num_latents": 0, "k": K, "d_in": d}
    (folder / "cfg.json").write_text(json.dumps(values | config))
    return folder


def dictionary(folder: Path, name: str, state: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    config = {"trainer": {"dict_class": name, "layer": 4, **trainer}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
