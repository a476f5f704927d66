"""Writes what is missing in a store: told before, resumable, shared among processes."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from groupsae.data.rows import Show
from groupsae.data.splits import Split
from groupsae.data.store.shard import Layout, ShardWriter
from groupsae.data.store.store import ActivationStore, Gap, shard_path
from groupsae.files.atomic import is_abandoned, temporary_name
from groupsae.files.locks import try_lock
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.runtime.units import format_bytes, format_seconds

CHUNK_BYTES = 64_000_000  # of one layer's file
RESERVE = 100_000_000  # bytes of the disk that are left for everything else
THREADS = 4  # that write, beside the next forward
FEW = 8  # forwards that are not worth a trial
PAUSE = 0.5  # seconds between two looks at what another process is writing

Model = Callable[[Split, Sequence[int]], Show]


class Filler(NamedTuple):
    """What fills a store.

    Attributes:
        store: to be filled.
        model: gives for some blocks of a split a way to show their activations; the language
            model is loaded when it is first called.
        share: blocks of a step that one process reads. Forwards are cut as training cuts them, so
            that stored activations are bit for bit those that a stream would make.
        blocks_per_forward: bounds the memory.
        rank: of this process among those of its run: each begins elsewhere.
        processes: of the run.
        say: prints a sentence, in one process of several.
        show: whether to show a bar.
    """

    store: ActivationStore
    model: Model
    share: int
    blocks_per_forward: int
    rank: int
    processes: int
    say: Callable[[str], object]
    show: bool

    def fill(self, gaps: list[Gap], later: int) -> float:
        """Write what is missing; return when it is there, whoever wrote it.

        Several processes, of one run or of several, share the work chunk by chunk.

        Args:
            gaps: of `ActivationStore.gaps`.
            later: bytes that will be asked for afterwards, at least: the disk must have room for
                them as well.

        Returns:
            Seconds that it took.

        Raises:
            UserError: the disk is too small or cannot be written; what was written is whole.
        """
        if not gaps:
            return 0.0
        began, store = time.perf_counter(), self.store
        self._clear()
        needed = sum(size_of(gap, store.layout) for gap in gaps)
        check_room(store.folder, needed, later)
        self._announce(gaps, needed)
        chunks = [chunk for gap in gaps for chunk in self._chunks(gap)]
        self._write(chunks)
        store.refresh()
        return time.perf_counter() - began

    def rewrite(self, path: Path, gap: Gap) -> None:
        """Put a file in the place of one that is damaged; its chunk is claimed.

        Raises:
            UserError: it cannot be written.
        """
        self._write_chunk(path.parent, gap, lambda _: None)

    def _clear(self) -> None:
        """Remove what killed processes left, and damaged files, which are then missing."""
        left = "*@*.tmp"
        for beside in [*self.store.folder.glob(left), *self.store.in_chunks(left)]:
            if is_abandoned(beside):
                shutil.rmtree(beside, ignore_errors=True)
                with suppress(OSError):
                    beside.unlink()
        for damaged in self.store.damaged:
            self.say(f"{damaged}: it is written anew.")
            with try_lock(damaged.path.parent) as mine:
                # who has it writes it anew just now, or did
                if mine and not self.store.is_sound(damaged.path):
                    damaged.path.unlink(missing_ok=True)

    def _chunks(self, gap: Gap) -> list[Gap]:
        """Return the blocks of a gap by the handful: whole steps, of some 64 MB a layer."""
        steps = CHUNK_BYTES // (self.store.layout.block_bytes * self.share * self.processes)
        size = max(1, steps) * self.share * self.processes
        return [
            Gap(gap.split, gap.blocks[i : i + size], gap.layers)
            for i in range(0, len(gap.blocks), size)
        ]

    def _announce(self, gaps: list[Gap], needed: int) -> None:
        """Say what will be written, and how long that will take by a trial."""
        tokens = {gap.split: 0 for gap in gaps}
        for gap in gaps:
            tokens[gap.split] += len(gap.blocks) * self.store.layout.context
        layers = len({layer for gap in gaps for layer in gap.layers})
        what = " and ".join(f"{count:,} {split} tokens" for split, count in tokens.items())
        sentence = (
            f"activations of {layers} layers for {what}: {format_bytes(needed)} to write into "
        )
        sentence += str(self.store.folder)
        forwards = sum(len(gap.blocks) for gap in gaps) / self.blocks_per_forward
        if forwards > FEW and self.rank == 0:  # the others come to it while this one tries
            seconds = self._trial(max(gaps, key=lambda gap: len(gap.blocks)))
            if seconds is not None:
                about = format_seconds(forwards * seconds / self.processes)
                sentence += f", about {about} by a trial"
        self.say(f"{sentence}.")

    def _trial(self, gap: Gap) -> float | None:
        """Return the seconds of a forward, of which everything is written and thrown away.

        None if that fails: what is wrong is told when the store itself is written.
        """
        trial = temporary_name(self.store.folder / "trial")
        part = Gap(gap.split, gap.blocks[: self.blocks_per_forward], gap.layers)
        seconds = 0.0
        try:
            trial.mkdir()
            for _ in range(2):  # the first one warms up
                began = time.perf_counter()
                self._write_chunk(trial, part, lambda _: None)
                seconds = time.perf_counter() - began
        except (OSError, UserError):
            return None
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        return seconds

    def _write(self, chunks: list[Gap]) -> None:
        """Write chunk after chunk; those that other processes are at come last."""
        first = len(chunks) * self.rank // self.processes
        waiting, told = chunks[first:] + chunks[:first], False
        context = self.store.layout.context
        total = sum(len(chunk.blocks) for chunk in chunks) * context
        with token_progress("storing activations", total, self.show) as advance:
            while waiting:
                others = []
                for chunk in waiting:
                    with try_lock(self.store.chunk_folder(chunk)) as mine:
                        if not mine:
                            others.append(chunk)
                            continue
                        self._complete(chunk, lambda blocks: advance(blocks * context))
                if len(others) == len(waiting):  # nothing to do but to wait
                    if not told:
                        self.say("another process is writing the rest: waiting for it.")
                    told = True
                    time.sleep(PAUSE)
                waiting = others

    def _complete(self, chunk: Gap, advance: Callable[[int], None]) -> None:
        """Write the files of a chunk that are not there: a killed process wrote some, perhaps."""
        folder = self.store.chunk_folder(chunk)
        layers = [x for x in chunk.layers if not self.store.is_sound(shard_path(folder, x))]
        if layers:
            self._write_chunk(folder, Gap(chunk.split, chunk.blocks, layers), advance)
        else:
            advance(len(chunk.blocks))

    def _write_chunk(self, folder: Path, chunk: Gap, advance: Callable[[int], None]) -> None:
        """Run the model over the blocks of a chunk; each layer's part is written as it comes."""
        with ExitStack() as stack:
            writers: dict[int, ShardWriter] = {}
            for layer in chunk.layers:
                path = shard_path(folder, layer)
                writers[layer] = ShardWriter(path, chunk.blocks, self.store.layout)
                stack.callback(writers[layer].discard)
            # after the writers: on an error the threads end before what they write to is closed
            pool = stack.enter_context(ThreadPoolExecutor(THREADS, "write-activations"))
            pending: list[Future[None]] = []
            for part in self._forwards(chunk.blocks):
                found = self._rows(chunk.split, part, chunk.layers)
                for done in pending:  # a file's parts come one after the other
                    done.result()
                pending = [pool.submit(writers[x].add, acts) for x, acts in found.items()]
                advance(len(part))
            for done in pending:
                done.result()
            for done in [pool.submit(writer.finish) for writer in writers.values()]:
                done.result()

    def _forwards(self, blocks: list[int]) -> Iterator[list[int]]:
        """Yield the blocks of each forward, as training would cut them."""
        for first in range(0, len(blocks), self.share):
            mine = blocks[first : first + self.share]
            for start in range(0, len(mine), self.blocks_per_forward):
                yield mine[start : start + self.blocks_per_forward]

    def _rows(
        self, split: Split, blocks: list[int], layers: list[int]
    ) -> dict[int, Shaped[Tensor, "block pos d_model"]]:
        """Return the activations of some blocks on the host, as they are stored.

        Raises:
            UserError: the dtype cannot hold them.
        """
        dtype = self.store.layout.dtype
        found: dict[int, Tensor] = {}

        def keep(layer: int, acts: Tensor) -> None:
            # a copy in any case: some blocks go on to write into what they put out
            stored = acts.to(dtype, copy=True)
            if dtype == torch.float16 and (stored.isinf() & ~acts.isinf()).any():
                raise UserError(
                    f"data.cache_dtype=float16 ends at 65,504, and layer {layer} has larger "
                    "activations: use bfloat16 or float32."
                )
            found[layer] = stored.cpu()

        self.model(split, blocks)(slice(None), layers, keep)
        return found


def size_of(gap: Gap, layout: Layout) -> int:
    """Return the bytes that a gap will take."""
    return len(gap.blocks) * len(gap.layers) * layout.block_bytes


def check_room(folder: Path, needed: int, later: int) -> None:
    """Raise UserError if the disk has not so many bytes free, now and for what comes later."""
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
