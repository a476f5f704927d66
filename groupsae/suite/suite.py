"""The SAEs of a run, saved as one folder per group and loaded without Lightning."""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from groupsae.files.atomic import atomic_write, write_json
from groupsae.files.reading import damaged
from groupsae.files.tensors import read_tensors, take
from groupsae.grouping.groupings import by_name
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE, SparseLatents
from groupsae.suite import interventions
from groupsae.suite.capture import Cache
from groupsae.suite.groups_file import load_plan
from groupsae.suite.hub import download, repository
from groupsae.suite.layer import Acts, Dense, LayerSAE

FORMAT = 2


class Suite:
    """The SAEs of a run: which one belongs to a layer, and how to use it there.

    Activations are those of the run's hookpoint (`resid_post` by default), raw as the language
    model has them. The layer's norm factor is applied before encoding and undone after decoding.

    Args:
        saes: name -> SAE.
        configs: name -> its `cfg.json`.

    Raises:
        UserError: two SAEs serve one layer.
    """

    def __init__(self, saes: dict[str, SAE], configs: dict[str, dict[str, Any]]) -> None:
        self.saes, self.configs = saes, configs
        self._owner: dict[int, str] = {}
        for name, config in configs.items():
            for layer in config["layers"]:
                if layer in self._owner:
                    raise UserError(
                        f"layer {layer} has two SAEs, {self._owner[layer]} and {name}: a suite "
                        "has one for each layer. Choose with load_suite(path, grouping=...)."
                    )
                self._owner[layer] = name
        for sae in saes.values():
            sae.eval().requires_grad_(False)
        self._views = {
            layer: LayerSAE(saes[name], layer, name, configs[name])
            for layer, name in self._owner.items()
        }

    @property
    def d_model(self) -> int:
        """Return the width of the activations."""
        return next(iter(self.saes.values())).d_model

    @property
    def layers(self) -> list[int]:
        """Return all layers that have an SAE."""
        return sorted(self._owner)

    @property
    def groups(self) -> dict[str, list[int]]:
        """Return the layers of each group, by its name."""
        return {name: list(config["layers"]) for name, config in self.configs.items()}

    def __repr__(self) -> str:
        """Return the groups and their widths."""
        return f"Suite({', '.join(f'{n}: {s.d_sae} latents' for n, s in self.saes.items())})"

    def __getitem__(self, layer: SupportsIndex) -> LayerSAE:
        """Return the SAE of a layer: its group's weights with this layer's norm factor.

        Raises:
            UserError: the layer has no SAE.
        """
        self.group_of(index(layer))
        return self._views[index(layer)]

    def __iter__(self) -> Iterator[LayerSAE]:
        """Return the SAEs of all layers, from the first layer to the last."""
        return (self._views[layer] for layer in self.layers)

    def __len__(self) -> int:
        """Return the number of layers that have an SAE."""
        return len(self._owner)

    def __contains__(self, layer: object) -> bool:
        """Return whether a layer has an SAE."""
        return layer in self._owner

    def to(self, device: torch.device | str | torch.dtype) -> "Suite":
        """Move every SAE to a device, or convert it to a dtype; returns the suite itself."""
        for sae in self.saes.values():
            sae.to(device)
        return self

    def group_of(self, layer: int) -> str:
        """Return the name of the group that a layer belongs to.

        Raises:
            UserError: the layer has no SAE.
        """
        if layer not in self._owner:
            raise UserError(f"no SAE for layer {layer}; this suite covers layers {self.layers}.")
        return self._owner[layer]

    def norm_factor(self, layer: int) -> float:
        """Return the factor that activations of a layer are multiplied by before encoding."""
        return self[layer].norm_factor

    @torch.no_grad()
    def encode(self, acts: Acts, layer: int) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of raw activations of a layer, dense: `suite[layer].encode(acts)`.

        No gradients are kept; those of `suite[layer]` are.
        """
        return self[layer].encode(acts)

    @torch.no_grad()
    def encode_sparse(self, acts: Acts, layer: int) -> SparseLatents:
        """Return the active latents of raw activations, as values and indices, [*batch, k]."""
        return self[layer].encode_sparse(acts)

    @torch.no_grad()
    def decode_sparse(self, latents: SparseLatents, layer: int) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction at the scale of `layer`'s raw activations."""
        return self[layer].decode(latents)

    @torch.no_grad()
    def decode(
        self, latents: Dense | SparseLatents, layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the reconstruction at the scale of `layer`'s raw activations."""
        return self[layer].decode(latents)

    @torch.no_grad()
    def reconstruct(self, acts: Acts, layer: int) -> Float[Tensor, "*batch d_model"]:
        """Return decode(encode(acts)) for one layer, in dense products."""
        return self[layer].decode(self[layer].encode(acts))

    # ---- in a language model --------------------------------------------------------------

    def capture(
        self, model: nn.Module, layers: interventions.Indices | None = None, tokenizer: Any = None
    ) -> AbstractContextManager[Cache]:
        """Collect raw activations and latents of layers in all forwards of a `with` block.

            with suite.capture(model, layers=[3, 5], tokenizer=tokenizer) as cache:
                model(**tokenizer("def f(self):", return_tensors="pt"))
            cache[5].acts     # raw, [batch, pos, d_model]
            cache[5].latents  # [batch, pos, d_sae], computed when first asked for
            cache[5].top(10)  # a DataFrame: latent, value, batch, position, token

        `Captured` describes what a layer has, `Cache` how several forwards are kept. Padding is
        captured as any position is; `top` and `active` leave it out.

        Args:
            model: any Hugging Face model with the depth and width of the one trained on.
            layers: layers to capture; None: all of the suite.
            tokenizer: shows tokens as text in `top` and `active`.

        Raises:
            UserError: a layer has no SAE; the model has another depth or width, is on another
                device, or was compiled; in a forward: the text is longer than the model reads.
        """
        return interventions.capture(model, self._views_of(layers), tokenizer)

    def splice(
        self,
        model: nn.Module,
        layers: interventions.Indices | None = None,
        error: bool = False,
        positions: slice | None = None,
    ) -> AbstractContextManager[None]:
        """Replace activations by their reconstructions in all forwards of a `with` block.

            with suite.splice(model, layers=[5]):
                logits = model(**inputs).logits

        Several layers are replaced together: a later one reconstructs what the earlier ones
        leave. The reconstruction is computed in the SAE's dtype and rounded to the model's, as
        `evaluate` does.

        Args:
            model: see `capture`.
            layers: layers to replace; None: all of the suite.
            error: add the SAE's error back. The forward is then unchanged, bit for bit; gradients
                flow through the reconstruction only.
            positions: replace only there, such as `slice(1, None)` for all but the first; None:
                everywhere. They count all that the model has read since its KV cache was empty,
                padding included.

        Raises:
            UserError: see `capture`.
        """
        return interventions.splice(model, self._views_of(layers), error, positions)

    def steer(
        self,
        model: nn.Module,
        layer: int,
        latent: interventions.Indices | None = None,
        scale: interventions.Scales = 1.0,
        *,
        set: Mapping[int, float] | None = None,
        multiply: Mapping[int, float] | None = None,
        clamp: Mapping[int, tuple[float | None, float | None]] | None = None,
        ablate: interventions.Indices = (),
        positions: slice | None = None,
    ) -> AbstractContextManager[None]:
        """Change latents of a layer in all forwards of a `with` block.

            with suite.steer(model, layer=5, latent=17, scale=4.0):
                model.generate(**inputs, max_new_tokens=20)
            with suite.steer(model, layer=5, ablate=[3, 8], set={17: 6.0}):
                loss = model(**inputs, labels=inputs["input_ids"]).loss

        `latent` and `scale` add scale * direction = scale * W_dec[latent] / norm_factor to the
        raw activations: a scale is in the units of the latent's own values. The other arguments
        encode, change the latents z and add (z' - z) directions, which keeps the SAE's error:
        where no latent changes, the activations stay as they are, bit for bit.

        Args:
            model: see `capture`.
            layer: the layer.
            latent: one latent, or several, to add.
            scale: how much of it, or of each.
            set: latent -> its value at every position, active or not.
            multiply: latent -> factor of its value where it is active.
            clamp: latent -> lowest and highest value; None: no bound.
            ablate: latents to set to zero.
            positions: see `splice`. After prompts of n tokens, `slice(n, None)` leaves them as
                they are and changes what follows.

        Raises:
            UserError: a latent does not exist or is changed twice; see `capture`.
        """
        return interventions.steer(
            model, self[layer], latent, scale,
            set=set, multiply=multiply, clamp=clamp, ablate=ablate, positions=positions,
        )  # fmt: skip

    def _views_of(self, layers: interventions.Indices | None) -> dict[int, LayerSAE]:
        chosen = self.layers if layers is None else layers
        views = [self[layer] for layer in interventions.listed(chosen)]
        if not views:
            raise UserError(f"layers is empty: give some of {self.layers}, or None for all.")
        return {view.layer: view for view in sorted(views, key=lambda view: view.layer)}


def load_suite(path: str | Path, grouping: str | None = None) -> Suite:
    """Return the SAEs of a run folder (or of its `saes` folder), on this machine or on the Hub.

    Args:
        path: the run folder, or `hf:owner/name`, or `hf:owner/name@revision`.
        grouping: for a run with groups=all: name of the grouping, such as `complete-3`,
            `per_layer` or `smaller-2`; None is the one that AMAD chose.

    Raises:
        UserError: no SAEs are found, one is damaged, the run has no such grouping, or the Hub
            refuses the files.
    """
    repo = repository(path)
    folder = Path(path) if repo is None else download(repo, ("saes/*", "groups.json"))
    folder = folder / "saes" if (folder / "saes").is_dir() else folder
    names = sorted(file.parent.name for file in folder.glob("*/cfg.json"))
    if not names:
        raise UserError(
            f"no SAEs under {path}: expected saes/<group>/cfg.json, as a finished run has them. "
            "To finish a run, give python -m groupsae.train resume=<run folder>."
        )
    plan = load_plan(folder.parent)
    if plan is not None:
        known = by_name(plan)
        chosen = next(iter(known)) if grouping is None else grouping
        if chosen not in known:
            raise UserError(f"no grouping '{chosen}' in {path}; it has {', '.join(known)}.")
        names = list(dict.fromkeys(known[chosen].sae_of_layer.values()))
    elif grouping is not None:
        raise UserError(
            f"{path} has no groups.json, so its SAEs form one grouping: leave out "
            f"grouping={grouping}."
        )
    return load_saes(folder, names)


def load_saes(folder: Path, names: Iterable[str]) -> Suite:
    """Return the named SAEs of a `saes` folder, which must not share a layer.

    Raises:
        UserError: one is missing or damaged, or two serve one layer.
    """
    loaded = {name: _load_sae(folder / name / "cfg.json") for name in names}
    return Suite(
        {name: sae for name, (sae, _) in loaded.items()},
        {name: config for name, (_, config) in loaded.items()},
    )


def save_sae(folder: Path, sae: SAE, config: dict[str, Any]) -> None:
    """Write `sae.safetensors`, in float32, and `cfg.json`.

    `config` has `architecture` (import path of the class), `arguments` (of its constructor),
    `layers`, `norm_factors` (layer -> factor) and anything else that is worth keeping.
    """
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in sae.state_dict().items()}
    with atomic_write(folder / "sae.safetensors") as handle:
        handle.write(save(tensors))  # (save_file would make it readable by its owner only)
    write_json(folder / "cfg.json", {"format": FORMAT, **config})


def _load_sae(file: Path) -> tuple[SAE, dict[str, Any]]:
    """Return the SAE next to a `cfg.json`, and the content of that file."""
    try:
        config = json.loads(file.read_text())
        if config["format"] != FORMAT:
            raise UserError(
                f"{file} has format {config['format']}, and this version of groupsae reads format "
                f"{FORMAT}: use the version that wrote it."
            )
        architecture = _architecture(config["architecture"], file)
        sae = architecture(**config["arguments"], generator=torch.Generator())
        weights = file.with_name("sae.safetensors")
        wanted = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        try:
            sae.load_state_dict(take(read_tensors(weights), wanted, weights))
        except UserError as error:
            raise UserError(f"{file.parent} is damaged: {error}") from error
        for layer in config["layers"]:
            float(config["norm_factors"][str(layer)])
    except UserError:
        raise
    except Exception as error:  # a truncated or edited file can lead to any of them
        raise damaged(file.parent, error) from error
    return sae, config


def _architecture(path: str, file: Path) -> type[SAE]:
    """Return the class that a `cfg.json` names, if it is one of our SAEs: never foreign code."""
    module, _, name = path.rpartition(".")
    found = None
    if module.startswith("groupsae.sae."):
        with suppress(ImportError):
            found = getattr(importlib.import_module(module), name, None)
    if isinstance(found, type) and issubclass(found, SAE) and found.__module__ == module:
        return found
    raise UserError(f"{file} names the architecture '{path}', which is not one of groupsae.sae.")
