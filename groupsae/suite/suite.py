"""The SAEs of a run, saved as one folder per group and loaded without Lightning."""

import importlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from html import escape
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from groupsae.files.atomic import atomic_folder, atomic_write, write_json
from groupsae.files.reading import damaged
from groupsae.files.tensors import read_tensors, take
from groupsae.grouping.groupings import by_name
from groupsae.interop.library import as_config
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE, SparseLatents
from groupsae.suite import interventions
from groupsae.suite.capture import Cache
from groupsae.suite.groups_file import load_plan
from groupsae.suite.hub import PREFIX, local_folder
from groupsae.suite.layer import Acts, Dense, LayerSAE

FORMAT = 2
SUMMARY, EVALUATION = "summary.json", "evaluation/evaluation.json"
# of a run folder: what was found out about its SAEs
RESULTS = (SUMMARY, "ledger.json", "evaluation/*.json", "evaluation/*.csv", "figures/*.png")


class Suite:
    """The SAEs of a run: which one belongs to a layer, and how to use it there.

    Activations are those of the run's hookpoint (`resid_post` by default), raw as the language
    model has them. The layer's norm factor is applied before encoding and undone after decoding.

    Args:
        saes: name of a group -> its SAE, which is frozen; what layers have of their own is in
            `suite[layer]`.
        configs: name -> its `cfg.json`: at least `layers`, and `norm_factors` (layer -> factor).
        run: the run folder, whose results are shown and saved with the SAEs; None: there is none.

    Raises:
        UserError: there is no SAE, or two serve one layer.

    >>> from groupsae import TopK
    >>> saes = {"layers.3-4": TopK(d_model=8, d_sae=32, k=4)}
    >>> configs = {"layers.3-4": {"layers": [3, 4], "norm_factors": {"3": 0.5, "4": 0.25}}}
    >>> suite = Suite(saes, configs)
    >>> suite
    Suite of 1 SAE for 2 layers of an unknown model (resid_post, d_model 8)
           SAE layers        kind latents tokens FVU L0
    layers.3-4    3-4 topk, k = 4      32      -   -  -
    >>> suite[4].encode(torch.ones(2, 10, 8)).shape
    torch.Size([2, 10, 32])
    >>> 4 in suite, len(suite), [sae.layer for sae in suite]
    (True, 2, [3, 4])
    """

    def __init__(
        self,
        saes: dict[str, SAE],
        configs: dict[str, dict[str, Any]],
        run: Path | None = None,
    ) -> None:
        if not saes:
            raise UserError("a suite has at least one SAE: give saes and configs, by name.")
        self.saes, self.configs, self.run = saes, configs, run
        self._names: dict[int, str] = {}
        self._views: dict[int, LayerSAE] = {}  # made when first asked for
        for name, config in configs.items():
            saes[name].eval().requires_grad_(False)
            for layer in config["layers"]:
                if layer in self._names:
                    raise UserError(
                        f"layer {layer} has two SAEs, {self._names[layer]} and {name}: a suite "
                        "has one for each layer. Choose with from_pretrained(path, grouping=...)."
                    )
                self._names[layer] = name

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        grouping: str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> "Suite":
        """Return the SAEs of a run, from this machine or from the Hub.

        Args:
            path: a run folder (or its `saes` folder, or one that `save` wrote), or a repository
                of the Hub: `owner/name`, `owner/name@revision`. A local folder wins over a
                repository of the same name; `hf:owner/name` is always the repository.
            grouping: for a run with groups=all: name of the grouping, such as `complete-3`,
                `per_layer` or `smaller-2`; None is the one that AMAD chose.
            device: where to put the SAEs; None: the CPU.
            revision: branch, tag or commit of the repository, instead of `@revision`.

        Raises:
            UserError: no SAEs are found, one is damaged, the run is not finished or has no such
                grouping, or the Hub refuses the files or cannot be reached.
        """
        folder = local_folder(path, revision, ("saes/*", "groups.json", SUMMARY, EVALUATION))
        saes = folder / "saes" if (folder / "saes").is_dir() else folder
        run = saes.parent
        names = sorted(file.parent.name for file in saes.glob("*/cfg.json"))
        plan = load_plan(run)
        if not names or (plan and not (run / SUMMARY).exists() and len(names) < len(plan.members)):
            raise _no_saes(path, folder)
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
        suite = load_saes(saes, names)
        return suite if device is None else suite.to(device)

    def load_model(
        self,
        device: torch.device | str | None = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        **load: Any,
    ) -> tuple[Any, Any]:
        """Return the language model that the SAEs were trained on, and its tokenizer.

        The model is transformers' own object with its head, as it was loaded for training (id,
        commit, dtype, quantisation), frozen and in evaluation mode. This imports transformers,
        which nothing else of a suite needs. A warning says if the weights have changed. The
        tokenizer is as the model has it: where `suite.cfg["prepend_bos"]` holds, training began
        each block with BOS, and so should a text of yours, which not every tokenizer does.

        Args:
            device: None: that of the SAEs.
            name: another folder or id on the Hub, if the model is not where it was.
            revision: another one than the recorded one.
            dtype: another one than the recorded one, such as `torch.bfloat16`.
            trust_remote_code: run code of the model's owner, if it was loaded so or needs it.
            **load: more arguments of transformers' from_pretrained, such as `device_map`.

        Raises:
            UserError: the suite names no model, or it cannot be loaded.
        """
        from groupsae.suite.model import load_model

        return load_model(
            self.cfg,
            torch.device(self.device if device is None else device),
            name=name,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **load,
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder that `from_pretrained` reads; return it.

        It holds the SAEs, in float32, `groups.json` if these are all SAEs of the run, and the
        run's results: summary, ledger, evaluation and figures.

        Args:
            folder: the folder to write.
            overwrite: replace an earlier one. A run folder is never replaced.

        Raises:
            UserError: the folder exists, or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not overwrite:
            raise UserError(f"{folder} exists: save(..., overwrite=True) replaces it.")
        with atomic_folder(folder, overwrite=overwrite, ours=_is_saved, source=self.run) as made:
            for name, sae in self.saes.items():
                save_sae(made / "saes" / name, sae, {**as_config(sae), **self.configs[name]})
            for name, file in self._files_of_run().items():
                (made / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, made / name)
        return folder

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = True,
        commit_message: str | None = None,
        revision: str | None = None,
        overwrite: bool = False,
    ) -> str:
        """Upload the SAEs, the run's results and a page about them; return the address.

        The token is that of `hf auth login` or HF_TOKEN. Paths of this machine are left out.

        Args:
            repo: owner/name; made if necessary.
            private: whether a new repository is visible to its owner only.
            commit_message: of the commit; None: how many layers it serves.
            revision: branch to commit to, made if necessary; None: the main one.
            overwrite: replace the SAEs and the page of a repository that has files.

        Raises:
            UserError: the name is none, the repository has files, or the Hub refuses the upload
                or cannot be reached.
        """
        from groupsae.suite.card import files_of_run, publish

        with TemporaryDirectory() as parent:
            folder = self.save(Path(parent, "suite"))
            return publish(
                repo.removeprefix(PREFIX),
                self,
                files_of_run(folder),
                run=self.run or folder,
                private=private,
                overwrite=overwrite,
                message=commit_message,
                revision=revision,
            )

    def _files_of_run(self) -> dict[str, Path]:
        """Return the run's files that describe these SAEs, by their paths in its folder."""
        if self.run is None:
            return {}
        plan = load_plan(self.run)
        complete = plan is not None and {p.name for p in plan.members} <= self.saes.keys()
        patterns = ("groups.json", *RESULTS) if complete else RESULTS
        files = [file for pattern in patterns for file in sorted(self.run.glob(pattern))]
        return {str(file.relative_to(self.run)): file for file in files if file.is_file()}

    # ---- what it is ---------------------------------------------------------------------

    @property
    def cfg(self) -> dict[str, Any]:
        """Return the first SAE's `cfg.json`: model, hookpoint and text are those of all."""
        return next(iter(self.configs.values()))

    @property
    def d_model(self) -> int:
        """Return the width of the activations."""
        return next(iter(self.saes.values())).d_model

    @property
    def device(self) -> torch.device:
        """Return where the SAEs are; where the first is, if they are in several places."""
        return next(iter(self.saes.values())).W_dec.device

    @property
    def layers(self) -> list[int]:
        """Return all layers that have an SAE."""
        return sorted(self._names)

    @property
    def groups(self) -> dict[str, list[int]]:
        """Return the layers of each group, by its name."""
        return {name: list(config["layers"]) for name, config in self.configs.items()}

    def table(self) -> Any:
        """Return a pandas DataFrame with a row for each SAE.

        Columns: sae (its name), layers, kind, d_sae (latents), tokens (that it was trained on),
        fvu and l0 (of the run's summary or evaluation). None where a value is unknown.
        """
        from groupsae.suite.table import table_of

        return table_of(self.saes, self.configs, self.run)

    def _heading(self) -> str:
        config, count = self.cfg, len(self.saes)
        return (
            f"Suite of {count} SAE{'s' * (count != 1)} for {len(self)} "
            f"layer{'s' * (len(self) != 1)} of {config.get('model') or 'an unknown model'} "
            f"({config.get('hookpoint', 'resid_post')}, d_model {self.d_model})"
        )

    def _shown(self) -> Any:
        from groupsae.suite.table import HEADINGS, as_text

        return as_text(self.table()).rename(columns=HEADINGS)

    def __repr__(self) -> str:
        """Return the table as text."""
        return f"{self._heading()}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        table = self._shown().to_html(index=False, border=0)
        return f"<p>{escape(self._heading())}</p>\n{table}"

    # ---- the SAEs of its layers -------------------------------------------------------------

    def __getitem__(self, layer: SupportsIndex) -> LayerSAE:
        """Return the SAE of a layer: its group's weights with this layer's norm factor.

        Raises:
            UserError: the layer has no SAE.
        """
        if not isinstance(layer, SupportsIndex):
            raise UserError(f"suite[{layer!r}]: give the number of one layer, such as suite[5].")
        number = index(layer)
        if number not in self._names:
            raise UserError(f"no SAE for layer {layer}; this suite covers layers {self.layers}.")
        if number not in self._views:
            name = self._names[number]
            view = LayerSAE(self.saes[name], number, name, self.configs[name])
            self._views[number] = view
        return self._views[number]

    def __iter__(self) -> Iterator[LayerSAE]:
        """Return the SAEs of all layers, from the first layer to the last."""
        return (self[layer] for layer in self.layers)

    def __len__(self) -> int:
        """Return the number of layers that have an SAE."""
        return len(self._names)

    def __contains__(self, layer: object) -> bool:
        """Return whether a layer has an SAE."""
        return layer in self._names

    def directions(self, name: str) -> Float[Tensor, "d_sae d_model"]:
        """Return the unit directions of an SAE's latents: the rows of its decoder.

        Where layers have maps of their own, that is the mean of the layers' decoders; a layer's
        is `suite[layer].W_dec`.
        """
        sae = self.saes[name]
        if sae.maps is None or sae.layer_rank == 0:
            return sae.directions()
        decoders = torch.stack([self[layer].W_dec for layer in self.groups[name]])
        return F.normalize(decoders.mean(0), dim=1)

    def to(self, device: torch.device | str | torch.dtype) -> "Suite":
        """Move every SAE to a device, or convert it to a dtype; returns the suite itself."""
        for sae in (*self.saes.values(), *self._views.values()):
            sae.to(device)
        return self

    def group_of(self, layer: int) -> str:
        """Return the name of the group that a layer belongs to.

        Raises:
            UserError: the layer has no SAE.
        """
        return self[layer].group

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
        captured as any position is; `top` and `active` leave it out. Activations stay on the
        model's device as long as the cache exists; within `torch.no_grad()`, or with a model from
        `load_model`, no graph is kept for gradients.

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
        `evaluate` does. `evaluate` leaves alone what the training left out (special tokens, first
        positions, extreme norms), if it did; here `positions` chooses.

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
        edits = interventions.Edits(
            self[layer], latent, scale, set=set, multiply=multiply, clamp=clamp, ablate=ablate
        )
        return interventions.steer(model, edits, positions)

    def dashboard(
        self,
        layer: SupportsIndex,
        latent: SupportsIndex,
        interpretation: str | Path | None = None,
    ) -> Any:
        """Return a latent's page, which a notebook shows inline: `groupsae.dashboard`.

        Raises:
            UserError: the layer has no SAE, it has no such latent, or the run was not interpreted.
        """
        import groupsae  # the package's public name: rooms above are not imported here

        return groupsae.dashboard(self, layer, latent, interpretation)

    def _views_of(self, layers: interventions.Indices | None) -> dict[int, LayerSAE]:
        chosen = self.layers if layers is None else layers
        views = [self[layer] for layer in interventions.indices(chosen, "layer")]
        if not views:
            raise UserError(f"layers is empty: give some of {self.layers}, or None for all.")
        return {view.layer: view for view in sorted(views, key=lambda view: view.layer)}


def load_suite(path: str | Path, grouping: str | None = None) -> Suite:
    """Return the SAEs of a run: `Suite.from_pretrained`, where arguments and errors are.

    >>> folder = suite.save("saes-of-tiny")
    >>> load_suite("saes-of-tiny").layers == suite.layers
    True
    """
    return Suite.from_pretrained(path, grouping)


def _no_saes(path: str | Path, folder: Path) -> UserError:
    """Return the error about a folder without SAEs, or without all of its plan."""
    if not folder.is_dir():
        return UserError(
            f"no SAEs under {path}: there is no such folder. Name a run folder, or a repository "
            "of the Hub as owner/name."
        )
    if (folder / "groups.json").exists() or (folder / ".hydra").is_dir():
        return UserError(
            f"the run in {path} is not finished, and has no SAEs yet: give\n"
            f"  {command('train', resume=folder)}"
        )
    return UserError(
        f"no SAEs under {path}: expected saes/<group>/cfg.json, as a finished run has them. SAEs "
        "in the format of another library become a run by python -m groupsae.import_saes."
    )


def _is_saved(folder: Path) -> bool:
    """Return whether `save` may have written a folder: SAEs, but no run that can be resumed."""
    return (folder / "saes").is_dir() and not (folder / ".hydra").exists()


def load_saes(folder: Path, names: Iterable[str]) -> Suite:
    """Return the named SAEs of a `saes` folder, which must not share a layer.

    Raises:
        UserError: one is missing or damaged, or two serve one layer.
    """
    loaded = {name: _load_sae(folder / name / "cfg.json") for name in names}
    return Suite(
        {name: sae for name, (sae, _) in loaded.items()},
        {name: config for name, (_, config) in loaded.items()},
        run=folder.parent,
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
        layers = [int(layer) for layer in config["layers"]]
        sae = architecture(**config["arguments"], layers=layers, generator=torch.Generator())
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
