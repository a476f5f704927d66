"""SAEs of every kind with random tensors, saved as the runs that the tests export and read."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig

from groupsae.files.atomic import write_json
from groupsae.interop.library import as_config, build
from groupsae.sae.base import SAE
from groupsae.suite.suite import save_sae
from tests.helpers.lms import frozen

D_MODEL, D_SAE, K = 16, 48, 5
KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated")
FACTORS = {0: 0.37, 1: 2.1, 3: 1.4}


def tensors_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Return tensors by our names: untied, with biases, decoder rows of unit norm."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decoder = draw(D_SAE, D_MODEL)
    decoder /= decoder.norm(dim=1, keepdim=True)
    found = {
        "W_enc": decoder + 0.1 * draw(D_SAE, D_MODEL),
        "W_dec": decoder,
        "b_dec": 0.3 * draw(D_MODEL),
    }
    if kind == "gated":
        found |= {"b_gate": 0.1 * draw(D_SAE) - 0.2, "b_mag": 0.1 * draw(D_SAE)}
        return found | {"r_mag": 0.3 * draw(D_SAE)}
    found["b_enc"] = 0.1 * draw(D_SAE) - 0.1
    if kind in ("batchtopk", "matryoshka"):
        found["threshold"] = torch.tensor(0.4)
    if kind == "jumprelu":
        found["threshold"] = 0.3 + 0.2 * torch.rand(D_SAE, generator=generator)
    return found


def more_of(kind: str) -> dict[str, Any]:
    """Return what `build` takes besides the tensors."""
    more: dict[str, Any] = {"k": K} if kind in ("topk", "batchtopk", "matryoshka") else {}
    return more | ({"prefixes": [0.25, 0.5, 1.0]} if kind == "matryoshka" else {})


def naive(kind: str, t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents and reconstruction as the architectures are defined, in float64."""
    t, x = {name: tensor.double() for name, tensor in t.items()}, x.double()
    shared = (x - t["b_dec"]) @ t["W_enc"].T
    if kind == "gated":
        magnitude = shared * t["r_mag"].exp() + t["b_mag"]
        acts = magnitude.clamp_min(0) * (shared + t["b_gate"] > 0)
    else:
        pre = shared + t["b_enc"]
        acts = pre.clamp_min(0)
        if "threshold" in t:
            acts = acts * (pre > t["threshold"])
        if kind == "topk":
            kept = torch.zeros_like(acts).scatter(1, acts.topk(K, dim=1).indices, 1.0)
            acts = acts * kept
    return acts, acts @ t["W_dec"] + t["b_dec"]


def rows(count: int = 40, seed: int = 7) -> Tensor:
    return 1.5 * torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def facts_of(hookpoint: str) -> dict[str, Any]:
    """Return what a run on a small Pythia keeps of it, under the name of a real one."""
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=D_MODEL, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        described = frozen(folder, hookpoint=hookpoint).described()
    return described | {"model": "EleutherAI/pythia-14m", "revision": "step1000"}


def run_folder(folder: Path, kind: str, own: dict[str, Any] | None = None, **more: Any) -> Path:
    """Save a finished run: one SAE for layers 0 and 1, one for layer 3, of a model of 4 layers.

    `own`: what layers have of their own, as arguments of the SAE.
    """
    for seed, (name, layers) in enumerate((("layers.0-1", [0, 1]), ("layers.3", [3]))):
        sae = build(kind, tensors_of(kind, seed), **more_of(kind))
        if own:
            plain = sae
            sae = type(sae)(**as_config(sae)["arguments"], **own, layers=layers)
            sae.load_state_dict(plain.state_dict(), strict=False)
            for parameter in sae.maps.parameters() if sae.maps else ():
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=_seeded(seed))
        save_sae(
            folder / "saes" / name,
            sae,
            {
                **as_config(sae),
                "layers": layers,
                "norm_factors": {layer: FACTORS[layer] for layer in layers},
                **facts_of(more.get("hookpoint", "resid_post")),
                "context": 64,
                "prepend_bos": False,
                "tokens": 1000,
                **more,
            },
        )
    write_json(folder / "summary.json", {"folder": str(folder.absolute()), "groups": {}})
    return folder


def dense(sae: SAE, x: Tensor) -> Tensor:
    with torch.no_grad():
        latents = sae.encode(x)
    return torch.zeros(len(x), sae.d_sae, dtype=x.dtype).scatter(1, latents.indices, latents.acts)


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
