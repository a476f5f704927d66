"""Writes missing activations to a store: announced, resumable, shared among processes."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from groupsae.data.packing import Split
from groupsae.data.rows import Show
from groupsae.data.store.shard import Layout, write_shard
from groupsae.data.store.store import ActivationStore, Gap, shard_path
from groupsae.files.locks import try_lock
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.runtime.units import format_bytes

CHUNK_BYTES = 64_000_000  # of one layer's file; a chunk of every layer is in memory
RESERVE = 100_000_000  # bytes of the disk that are left for everything else
THREADS = 4  # that write
PAUSE = 0.5  # seconds between two tries, while another process writes

Model = Callable[[Split, Sequence[int]], Show]


@dataclass(frozen=True)
class Filler:
    """Fills a store; several processes, of one run or of several, share the work by chunks."""

    store: ActivationStore
    model: Model  # the language model is loaded when it is first called
    # Blocks of a step that one process reads. Forwards are split as training splits them, so that
    # stored activations are bit for bit those of streaming.
    share: int
    blocks_per_forward: int
    rank: int  # among the processes of its run: each begins elsewhere
    processes: int
    say: Callable[[str], object]  # prints a message, in one process of several

    def fill(self, gaps: list[Gap], later: int) -> None:
        """Write the missing part; return when all is stored, by any process.

        `later` bytes are needed afterwards, at least: the disk must have room for them as well.

        Raises:
            UserError: the disk is too small or cannot be written; complete files stay.
        """
        for damaged in self.store.damaged:  # counts as missing
            self.say(f"{damaged}: it is deleted, and written again when a run needs it.")
            with try_lock(damaged.path.parent) as mine:
                # otherwise another process is writing it just now, or has
                if mine and not self.store.is_sound(damaged.path):
                    damaged.path.unlink(missing_ok=True)
        store, context = self.store, self.store.layout.context
        needed = sum(size_of(gap, store.layout) for gap in gaps)
        check_room(store.folder, needed, later)
        tokens = dict.fromkeys((gap.split for gap in gaps), 0)
        for gap in gaps:
            tokens[gap.split] += len(gap.blocks) * context
        layers = len({layer for gap in gaps for layer in gap.layers})
        what = " and ".join(f"{count:,} {split} tokens" for split, count in tokens.items())
        self.say(
            f"activations of {layers} layers for {what}: {format_bytes(needed)} to write into "
            f"{store.folder}."
        )
        chunks = [chunk for gap in gaps for chunk in self._chunks(gap)]
        first = len(chunks) * self.rank // self.processes
        total = sum(tokens.values())
        with token_progress("storing activations", total, self.rank == 0) as advance:
            self._write(chunks[first:] + chunks[:first], lambda blocks: advance(blocks * context))
        store.refresh()

    def _chunks(self, gap: Gap) -> Iterator[Gap]:
        """Yield the blocks of a gap, about 64 MB a layer at a time, in complete forwards."""
        block_bytes = self.store.layout.block_bytes
        unit = self.share
        if unit * block_bytes > CHUNK_BYTES:
            unit = min(unit, self.blocks_per_forward)
        size = max(1, CHUNK_BYTES // (block_bytes * unit)) * unit
        for i in range(0, len(gap.blocks), size):
            yield Gap(gap.split, gap.blocks[i : i + size], gap.layers)

    def _write(self, chunks: list[Gap], advance: Callable[[int], None]) -> None:
        """Write chunk after chunk; those that other processes are writing come last."""
        announced = False
        while chunks:
            others = []
            for chunk in chunks:
                folder = self.store.chunk_folder(chunk)
                with try_lock(folder) as mine:
                    if mine:
                        self._write_chunk(folder, chunk, advance)
                    else:
                        others.append(chunk)
            if len(others) == len(chunks):  # nothing to do but to wait
                if not announced:
                    self.say("another process is writing the rest: waiting for it.")
                announced = True
                time.sleep(PAUSE)
            chunks = others

    def _write_chunk(self, folder: Path, chunk: Gap, advance: Callable[[int], None]) -> None:
        """Write the files of a chunk that do not exist: a killed process may have written some."""
        paths = {layer: shard_path(folder, layer) for layer in chunk.layers}
        missing = [x for x, path in paths.items() if not self.store.is_sound(path)]
        if not missing:
            advance(len(chunk.blocks))
            return
        for leftover in folder.glob("*.tmp"):  # of a killed process: this one has the lock
            leftover.unlink(missing_ok=True)
        layout = self.store.layout
        size = (len(chunk.blocks), layout.context, layout.d_model)
        acts = {layer: torch.empty(size, dtype=layout.dtype) for layer in missing}
        for start, stop in self._forwards(len(chunk.blocks)):

            def keep(layer: int, shown: Tensor, start: int = start, stop: int = stop) -> None:
                acts[layer][start:stop] = _stored(shown, layer, layout.dtype)

            self.model(chunk.split, chunk.blocks[start:stop])(slice(None), missing, keep)
            advance(stop - start)
        with ThreadPoolExecutor(THREADS, "write-activations") as pool:
            for done in [
                pool.submit(write_shard, paths[layer], chunk.blocks, acts.pop(layer))
                for layer in missing
            ]:
                done.result()

    def _forwards(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """Yield where each forward starts and stops in a chunk, as training would split it."""
        for first in range(0, num_blocks, self.share):
            last = min(first + self.share, num_blocks)
            for start in range(first, last, self.blocks_per_forward):
                yield start, min(start + self.blocks_per_forward, last)


def _stored(acts: Tensor, layer: int, dtype: torch.dtype) -> Tensor:
    """Return activations in the store's dtype.

    Raises:
        UserError: the dtype cannot hold them.
    """
    stored = acts.to(dtype)
    if dtype == torch.float16 and (stored.isinf() & ~acts.isinf()).any():
        raise UserError(
            f"data.cache_dtype=float16 ends at 65,504, and layer {layer} has larger "
            "activations: use bfloat16 or float32."
        )
    return stored


def size_of(gap: Gap, layout: Layout) -> int:
    """Return the bytes that a gap will take."""
    return len(gap.blocks) * len(gap.layers) * layout.block_bytes


def check_room(folder: Path, needed: int, later: int) -> None:
    """Raise UserError if the disk has too few bytes free, now and for later parts."""
    free = shutil.disk_usage(folder).free - RESERVE
    if needed + later <= free:
        return
    also = f", and at least {format_bytes(later)} more afterwards" if later else ""
    raise UserError(
        f"activations to be stored take {format_bytes(needed)}{also}, but {folder} has room for "
        f"{format_bytes(max(0, free))}: name a folder on a larger disk (data.cache=<folder>), "
        "lower tokens or calibration.tokens, halve them with data.cache_dtype=bfloat16 if it is "
        "float32, or use data.cache=null, which stores nothing."
    )
