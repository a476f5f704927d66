"""A folder of stored activations: its content, the missing part, and reading it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from groupsae.data.packing import SPLITS, Split
from groupsae.data.store.shard import DTYPES, Damaged, Layout, Shard
from groupsae.files.atomic import atomic_write
from groupsae.runtime.errors import UserError

FORMAT = 1  # raise it when files or their meaning change: new stores then get other folders


class Gap(NamedTuple):
    """Blocks of one split that lack the same layers."""

    split: Split
    blocks: list[int]  # in the order that they were asked for in
    layers: list[int]  # those that are missing


class ActivationStore:
    """Activations of a language model over the packed blocks of a corpus, on disk.

    A chunk is a handful of blocks; it has a folder `<split>/<chunk>/` with a file for each layer,
    as `groupsae.data.store.shard` describes them. A file exists when it is complete, and the
    store is the sum of all files: so it may grow by blocks or by layers at any time, by several
    processes at once.

    Reading it elsewhere, with the tokens of `ActivationDataModule.blocks`:

        store = ActivationStore(Path("activations/3f0c5a1b2d4e6f70"))
        for block, acts in store.iterate("heldout", layer=5):   # acts: [pos, d_model]
            tokens = data.blocks.blocks["heldout"][block]       # [pos]

    Args:
        folder: a folder with a `manifest.json`.

    Attributes:
        manifest: origin of the activations, as plain values.
        layout: sizes and dtype of a block.
        damaged: files that differ from their checksums; they count as missing.

    Raises:
        UserError: there is no manifest, or it is damaged or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"format {self.manifest['format']}, not {FORMAT}")
            context, d_model = self.manifest["context"], self.manifest["d_model"]
            self.layout = Layout(context, d_model, dtype_of(self.manifest["dtype"]))
            self.num_blocks: dict[Split, int] = {s: self.manifest["num_blocks"][s] for s in SPLITS}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no store of activations, or its manifest.json is damaged ({error}): "
                "name a folder within data.cache, or delete it and give the command of its run "
                "again."
            ) from error
        self.damaged: list[Damaged] = []
        self._shards: list[Shard] = []
        self._known: set[Path] = set()
        # block -> which shard, and where in it
        self._places: dict[tuple[Split, int], Int64[np.ndarray, "block 2"]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find files that other processes have written since."""
        self.damaged = []
        for path in sorted(self.folder.glob("*/*/layer.*.safetensors")):
            if path in self._known:
                continue
            try:
                shard, split, layer = self._opened(path)
            except Damaged as error:
                self.damaged.append(error)
                continue
            places = self._places.setdefault(
                (split, layer), np.full((self.num_blocks[split], 2), -1, dtype=np.int64)
            )
            places[shard.blocks, 0] = len(self._shards)
            places[shard.blocks, 1] = np.arange(len(shard.blocks))
            self._shards.append(shard)
            self._known.add(path)

    def is_sound(self, path: Path) -> bool:
        """Return whether a file exists and its record is right; activations are not read."""
        try:
            self._opened(path)
        except Damaged:
            return False
        return True

    def _opened(self, path: Path) -> tuple[Shard, Split, int]:
        """Return a file, its split and layer."""
        shard = Shard(path, self.layout)
        split, layer = path.parts[-3], int(path.name.split(".")[1])
        if split not in SPLITS or (shard.blocks >= self.num_blocks[split]).any():
            raise Damaged(path, "it belongs to other text")
        return shard, split, layer

    def has(self, split: Split, blocks: Sequence[int], layer: int) -> np.ndarray:
        """Return which of the blocks are stored at a layer, bool [block]."""
        places = self._places.get((split, layer))
        wanted = np.asarray(blocks, dtype=np.int64)
        return np.zeros(len(wanted), dtype=bool) if places is None else places[wanted, 0] >= 0

    def blocks(self, split: Split, layer: int) -> list[int]:
        """Return the blocks that are stored at a layer, ascending."""
        every = range(self.num_blocks[split])
        stored: list[int] = np.flatnonzero(self.has(split, every, layer)).tolist()
        return stored

    def gaps(self, split: Split, blocks: Sequence[int], layers: Sequence[int]) -> list[Gap]:
        """Return the missing parts of some blocks and layers, grouped by missing layers."""
        missing = np.stack([~self.has(split, blocks, layer) for layer in layers], axis=1)
        return [
            Gap(
                split,
                [blocks[i] for i in np.flatnonzero((missing == pattern).all(axis=1)).tolist()],
                [layer for layer, lacks in zip(layers, pattern, strict=True) if lacks],
            )
            for pattern in np.unique(missing, axis=0)[::-1]
            if pattern.any()
        ]

    def read(
        self,
        split: Split,
        block: int,
        layer: int,
        out: Shaped[Tensor, "pos d_model"] | None = None,
    ) -> Shaped[Tensor, "pos d_model"]:
        """Return the activations of a block at a layer, unfiltered, in the store's dtype.

        They are put into `out` if it is given.

        Raises:
            Damaged: they are not what was written.
            KeyError: they are not stored.
        """
        places = self._places.get((split, layer))
        if places is None or not 0 <= block < len(places) or places[block, 0] < 0:
            raise KeyError(f"block {block} of {split} at layer {layer}")
        if out is None:
            out = torch.empty(self.layout.context, self.layout.d_model, dtype=self.layout.dtype)
        number, row = places[block]
        self._shards[number].read(int(row), out)
        return out

    def iterate(self, split: Split, layer: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (block, its activations [pos, d_model]) of all that is stored, ascending."""
        for block in self.blocks(split, layer):
            yield block, self.read(split, block, layer)

    def chunk_folder(self, gap: Gap) -> Path:
        """Return the folder for the files of these blocks: the same for all processes."""
        key = hashlib.sha256(np.asarray(gap.blocks, dtype="<i8").tobytes()).hexdigest()[:16]
        return self.folder / gap.split / key


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of one of the names in `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def shard_path(chunk: Path, layer: int) -> Path:
    """Return the file of a layer in the folder of a chunk."""
    return chunk / f"layer.{layer:02}.safetensors"


def store_folder(cache: Path, made_from: dict[str, Any], layout: Layout) -> Path:
    """Return the folder of the store of this content, whether or not it exists.

    `made_from` is what decides the activations, as plain values: it is the key.
    """
    content = json.dumps(_content(made_from, layout), sort_keys=True)
    return cache / hashlib.sha256(content.encode()).hexdigest()[:16]


def open_store(
    cache: Path, made_from: dict[str, Any], layout: Layout, num_blocks: dict[Split, int]
) -> ActivationStore:
    """Return the store of this content, an empty one if none exists.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = store_folder(cache, made_from, layout)
    try:
        return ActivationStore(folder)
    except UserError:  # none yet, or a damaged manifest, which holds nothing new
        manifest = folder / "manifest.json"
        with atomic_write(manifest, "w", shared=True, hint="data.cache=<folder>") as handle:
            json.dump({**_content(made_from, layout), "num_blocks": num_blocks}, handle, indent=1)
    return ActivationStore(folder)


def _content(made_from: dict[str, Any], layout: Layout) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "context": layout.context,
        "d_model": layout.d_model,
        "made_from": made_from,
    }
