"""The files of an interpretation: what was collected, for every later stage and for users."""

import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save
from torch import Tensor

from groupsae.files.atomic import explain_write_errors, write_json
from groupsae.files.reading import damaged, missing, read_json, require_json
from groupsae.files.tensors import read_tensors
from groupsae.interpretation.contexts import EMPTY, value_of
from groupsae.interpretation.directions import Directions
from groupsae.interpretation.reading import DIRECTIONS, Pass
from groupsae.interpretation.statistics import UNIT
from groupsae.interpretation.text import TEXTS, document_bounds
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError

FORMAT = 1
COLLECTED = "collected"


class LatentContexts(NamedTuple):
    """The contexts that were kept of the latents of an SAE."""

    # position of the highest activation: block * context + token; -1 where there are fewer
    peaks: Int[np.ndarray, "d_sae size"]
    values: Float[np.ndarray, "d_sae size"]  # that activation, in the SAE's units
    starts: Int[np.ndarray, "d_sae size"]  # position of the first token
    lengths: UInt8[np.ndarray, "d_sae size"]  # number of tokens
    # activations of all tokens, 0 after the end, for each of `layers`
    acts: Float[np.ndarray, "d_sae size layer window"]


class CollectedSAE:
    """What was collected of one SAE.

    Attributes:
        name: name of the SAE.
        layers: layers that it serves.
        d_sae: number of latents.
        latents: latents that were recorded, in the order in which they are chosen from.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, str(head["name"])
        self.layers: list[int] = head["layers"]
        self.d_sae: int = head["d_sae"]
        self.latents = np.array(head["latents"], np.int64)
        self._records: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # rows, bounds of latents

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / f"{self.name}.safetensors")

    def fired(self, layer: int) -> Int[np.ndarray, "text d_sae"]:
        """Return the tokens on which each latent fired on a layer, by text."""
        return self._statistic(layer, "fired")

    def windows(self, layer: int) -> Int[np.ndarray, "text d_sae"]:
        """Return the windows in which each latent fired on a layer, by text."""
        return self._statistic(layer, "windows")

    def mass(self, layer: int) -> Float[np.ndarray, "text d_sae"]:
        """Return the sum of each latent's activations on a layer, by text."""
        return self._statistic(layer, "mass") * UNIT

    def histogram(self, layer: int) -> tuple[Int[np.ndarray, "d_sae bins"], np.ndarray]:
        """Return each latent's histogram of activations on a layer, and where it ends."""
        ends = np.ldexp(1.0, self._statistic(layer, "exponent"))
        return self._statistic(layer, "histogram"), ends

    def contexts(self, kind: str, layer: int | None = None) -> LatentContexts:
        """Return contexts: `top`, `train` or `heldout` of one layer, or `across` of all."""
        place = kind if layer is None else f"{kind}/layer.{layer}"
        keys, peaks, before, lengths, acts = (
            self._tensors[f"{place}/{name}"]
            for name in ("keys", "peaks", "before", "lengths", "acts")
        )
        if kind in TEXTS:  # their keys are random numbers
            places = before.long()[..., None, None].expand(*acts.shape[:-1], 1)
            values = acts.gather(-1, places)[..., 0, 0].float()
        else:
            values = value_of(keys)
        return LatentContexts(
            peaks.numpy(),
            torch.where(keys == EMPTY, 0.0, values).numpy(),
            torch.where(keys == EMPTY, -1, peaks - before).numpy(),
            lengths.numpy(),
            acts.numpy(),
        )

    def firings(
        self, layer: int, latent: int
    ) -> tuple[Int[np.ndarray, " firing"], Float[np.ndarray, " firing"]]:
        """Return positions and activations of every firing of a recorded latent on a layer."""
        if layer not in self._records:
            rows = _array(self.folder / self.name / f"layer.{layer}.npy", mapped=True)
            bounds = np.searchsorted(rows["latent"], np.arange(self.d_sae + 1))
            self._records[layer] = rows, bounds
        rows, bounds = self._records[layer]
        part = rows[bounds[latent] : bounds[latent + 1]]
        return part["position"].astype(np.int64), part["act"].astype(np.float32)

    @cached_property
    def directions(self) -> Directions:
        """Return each latent's neighbours in the decoder and its effect on the logits."""
        return _read_directions(self.folder / f"{self.name}.npz")

    def directions_at(self, layer: int) -> Directions:
        """Return the same of the decoder that the SAE has on a layer."""
        file = self.folder / f"{of_layer(self.name, layer)}.npz"
        return _read_directions(file) if file.exists() else self.directions

    def _statistic(self, layer: int, name: str) -> np.ndarray:
        found: np.ndarray = self._tensors[f"statistics/layer.{layer}/{name}"].numpy()
        return found


def _array(file: Path, *, mapped: bool = False) -> np.ndarray:
    try:
        found: np.ndarray = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except FileNotFoundError:
        raise missing(file) from None
    except (OSError, ValueError) as error:
        raise damaged(file, error) from error
    return found


def of_layer(name: str, layer: int) -> str:
    """Return the name of an SAE's directions on one layer, where layers differ in them."""
    return f"{name}/layer.{layer}"


def _read_directions(file: Path) -> Directions:
    with np.load(file, allow_pickle=False) as stored:
        return Directions(*(stored[name] for name in Directions._fields))


class Interpretation:
    """What was collected about the latents of a run, read from its folder.

    Attributes:
        folder: `interpretation` in the run folder.
        head: what was collected on what: model, text, options, tokens of each text.
        saes: by name.

    Raises:
        UserError: nothing was collected, or a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head: dict[str, Any] = require_json(folder / COLLECTED / "collected.json")
        self.saes = {s["name"]: CollectedSAE(folder / COLLECTED, s) for s in self.head["saes"]}
        self.context: int = self.head["context"]
        self.num_tokens: list[int] = self.head["num_tokens"]

    @classmethod
    def of(cls, folder: Path) -> "Interpretation":
        """Return what was collected in a folder `interpretation` of a run.

        Raises:
            UserError: nothing was, with the command that does it, or a file is damaged.
        """
        if not (folder / COLLECTED / "collected.json").exists():
            raise UserError(
                f"{folder.parent} was not interpreted, and pages about latents are made of what "
                f"that collects: {command('interpret', run=folder.parent)}"
            )
        return cls(folder)

    @cached_property
    def tokens(self) -> Int[np.ndarray, " position"]:
        """Return the token at every position of both texts, as the model read it."""
        return _array(self.folder / COLLECTED / "tokens.npy").reshape(-1)

    @cached_property
    def bounds(self) -> tuple[Int[Tensor, "position"], Int[Tensor, "position"]]:
        """Return where the document at every position begins and ends, within its block."""
        tokens = torch.from_numpy(self.tokens.reshape(-1, self.context))
        return document_bounds(tokens, self.head["end_token"])

    @cached_property
    def pieces(self) -> Int[np.ndarray, " position"]:
        """Return a number of the piece of a document at every position: its part of a block."""
        found: np.ndarray = np.unique(self.bounds[0].numpy(), return_inverse=True)[1]
        return found

    @cached_property
    def documents(self) -> Int[np.ndarray, " position"]:
        """Return a number of the document at every position; its piece in the text to explain."""
        begins = _array(self.folder / COLLECTED / "documents.npy")
        is_end = self.tokens.reshape(-1, self.context)[-len(begins) :] == self.head["end_token"]
        ended = np.cumsum(is_end, axis=1) - is_end  # a token that ends a document belongs to it
        early = self.pieces[: -is_end.size]
        return np.concatenate([early, (begins[:, None] + ended).ravel() + len(early)])

    @cached_property
    def strings(self) -> dict[int, str]:
        """Return the text of every token id that occurs."""
        stored = require_json(self.folder / COLLECTED / "strings.json")
        return {int(token): text for token, text in stored.items()}

    @cached_property
    def explanations(self) -> dict[str, Any]:
        """Return the explained latents of each SAE; empty if these contexts were not explained."""
        stored = read_json(self.folder / "explanations.json") or {}
        return stored["saes"] if stored.get("key", [None])[0] == self.head["key"] else {}

    @property
    def judged(self) -> list[dict[str, Any]]:
        """Return what language models have found on this text, the latest last."""
        files = sorted((self.folder / "judged").glob("*-*.json"), key=lambda f: f.stat().st_mtime)
        every = [read_json(file) or {} for file in files]
        return [one for one in every if one.get("collected") == self.head["key"]]

    def resampled(self, name: str) -> np.ndarray:
        """Return F1 of an SAE's explanations on resamples of the documents."""
        return _array(self.folder / "resampled" / f"{name}.npy")

    def projections(self, layer: int) -> np.ndarray:
        """Return a layer's activations along random directions, [position, direction]."""
        file = self.folder / COLLECTED / f"random.layer.{layer}.bin"
        return np.memmap(file, "<f2", "r").reshape(-1, DIRECTIONS)

    def text(self, start: int, length: int) -> list[str]:
        """Return the text of some tokens, one string each."""
        return [self.strings[int(token)] for token in self.tokens[start : start + length]]


def save_collected(
    folder: Path,
    head: Mapping[str, Any],
    found: Pass,
    directions: Mapping[str, Directions],
    strings: Mapping[int, str],
) -> None:
    """Write what a finished pass has collected, and remove its unfinished state.

    The other processes' shares have been joined before.
    """
    target = folder / COLLECTED
    with explain_write_errors(target, "interpret a copy of the run"):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name, collector in found.collectors.items():
            (target / name).mkdir()
            for layer in collector.layers:
                np.save(target / name / f"layer.{layer}.npy", collector.records.sorted_rows(layer))
            tensors = {k: v.contiguous().cpu() for k, v in collector.state().items()}
            (target / f"{name}.safetensors").write_bytes(save(tensors))
        for name, each in directions.items():
            np.savez_compressed(target / f"{name}.npz", **each._asdict())
        np.save(target / "tokens.npy", found.text.read())
        np.save(target / "documents.npy", found.text.heldout_documents())
        for file in found.folder.glob("random.*.bin"):
            # it is longer if a pass over more text was stopped before
            os.truncate(file, sum(found.text.tokens) * 2 * DIRECTIONS)
            file.replace(target / file.name)
    write_json(target / "strings.json", {str(token): text for token, text in strings.items()})
    saes = [
        {
            "name": name,
            "layers": collector.layers,
            "d_sae": collector.d_sae,
            "latents": collector.candidates.tolist(),
        }
        for name, collector in found.collectors.items()
    ]
    written = {"format": FORMAT, **head, "saes": saes}
    write_json(target / "collected.json", written)  # last: it marks the rest as complete
    shutil.rmtree(found.folder, ignore_errors=True)
