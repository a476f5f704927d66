"""The SAEs of a run, saved as one folder per group and loaded without Lightning."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groupsae.data.writer import write_json
from groupsae.errors import UserError

FORMAT = 1


def save_sae(folder: Path, sae: nn.Module, config: dict[str, Any]) -> None:
    """Write `sae.safetensors` and `cfg.json`.

    Args:
        folder: of this group.
        sae: the SAE; its parameters are saved in float32.
        config: `architecture` (import path of the class), `arguments` (of its constructor),
            `layers`, `norm_factors` (layer -> factor) and whatever else is worth keeping.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in sae.named_parameters()}
    save_file(tensors, folder / "sae.safetensors.tmp")
    (folder / "sae.safetensors.tmp").replace(folder / "sae.safetensors")
    write_json(folder / "cfg.json", {"format": FORMAT, **config})


class Suite:
    """The SAEs of a run: which one belongs to a layer, and how to use it there.

    Activations are the raw `resid_post` of the language model, as the blocks put them out. The
    layer's norm factor is applied before encoding and undone after decoding.

    Args:
        saes: name -> SAE.
        configs: name -> its `cfg.json`.
    """

    def __init__(self, saes: dict[str, nn.Module], configs: dict[str, dict[str, Any]]) -> None:
        self.saes, self.configs = saes, configs
        self._owner = {layer: name for name, c in configs.items() for layer in c["layers"]}

    @property
    def layers(self) -> list[int]:
        """Return all layers that have an SAE."""
        return sorted(self._owner)

    def group_of(self, layer: int) -> str:
        """Return the name of the group that a layer belongs to.

        Raises:
            UserError: no SAE was trained for this layer.
        """
        if layer not in self._owner:
            raise UserError(f"no SAE for layer {layer}; this suite covers layers {self.layers}.")
        return self._owner[layer]

    def norm_factor(self, layer: int) -> float:
        """Return what activations of a layer are multiplied by before encoding."""
        return float(self.configs[self.group_of(layer)]["norm_factors"][str(layer)])

    @torch.no_grad()
    def encode(self, acts: Float[Tensor, "*batch d_model"],
               layer: int) -> Float[Tensor, "*batch d_sae"]:
        """Return the latent activations, dense.

        Args:
            acts: raw residual activations of `layer`, any leading shape.
            layer: where they come from.
        """
        sae = self.saes[self.group_of(layer)]
        rows = acts.reshape(-1, acts.shape[-1])
        values, indices = sae.encode(rows * self.norm_factor(layer))
        dense = torch.zeros(len(rows), sae.d_sae, dtype=values.dtype, device=values.device)
        return dense.scatter_(1, indices, values).reshape(*acts.shape[:-1], sae.d_sae)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "*batch d_sae"],
               layer: int) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction at the scale of `layer`'s raw activations.

        Args:
            latents: dense latent activations, any leading shape.
            layer: whose activations to reconstruct.
        """
        sae = self.saes[self.group_of(layer)]
        return (latents @ sae.W_dec + sae.b_dec) / self.norm_factor(layer)

    def reconstruct(self, acts: Float[Tensor, "*batch d_model"],
                    layer: int) -> Float[Tensor, "*batch d_model"]:
        """Return decode(encode(acts)) for one layer."""
        return self.decode(self.encode(acts, layer), layer)


def load_suite(path: str | Path) -> Suite:
    """Return the SAEs of a run folder (or of its `saes` folder).

    Raises:
        UserError: there are none, or one is damaged.
    """
    folder = Path(path)
    folder = folder / "saes" if (folder / "saes").is_dir() else folder
    found = sorted(folder.glob("*/cfg.json"))
    if not found:
        raise UserError(
            f"no SAEs under {path}: expected saes/<group>/cfg.json, as a finished run leaves "
            "them. An unfinished run is finished by resume=<run folder>.")
    saes, configs = {}, {}
    for file in found:
        config = json.loads(file.read_text())
        module, name = config["architecture"].rsplit(".", 1)
        if not module.startswith("groupsae.sae."):
            raise UserError(f"{file} names the architecture {config['architecture']}, which is "
                            "not one of groupsae.sae.")
        sae = getattr(importlib.import_module(module), name)(
            **config["arguments"], generator=torch.Generator())
        try:
            sae.load_state_dict(load_file(file.with_name("sae.safetensors")))
        except Exception as error:
            raise UserError(f"{file.parent} is damaged: {error}") from error
        saes[file.parent.name], configs[file.parent.name] = sae.eval(), config
    return Suite(saes, configs)
