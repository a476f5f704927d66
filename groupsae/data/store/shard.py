"""One file of stored activations: some blocks of tokens at one layer, whole or not there.

It is an ordinary safetensors file, `safetensors.torch.load_file` reads it, with four tensors:

| tensor | shape | what |
|---|---|---|
| `blocks` | int64 [block] | which blocks of the packed corpus' split |
| `checksums` | int64 [block] | XXH3 of the bytes of each block's activations |
| `record` | int64 [1] | XXH3 of the bytes of the two above |
| `acts` | [block, pos, d_model] | their activations, unfiltered |

So the record of what is there and the activations are one file, and no kill parts them. Checksums
are by block because a run reads block by block, in shuffled order: to check a block costs what it
costs to read it, whereas whole files would all be read for the first step.
"""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
import torch
import xxhash
from jaxtyping import Int64, Shaped
from torch import Tensor

from groupsae.data.store.options import DTYPES
from groupsae.files.atomic import explain_write_errors, temporary_name
from groupsae.runtime.errors import UserError

LARGEST_HEADER = 100_000  # bytes; ours have about 400
OF_THE_FILE = (errno.ENOENT, errno.EIO)  # errors that writing it anew mends


class Damaged(Exception):
    """A file of stored activations is not what was written."""

    def __init__(self, path: Path, how: str) -> None:
        super().__init__(f"{path} is damaged ({how})")
        self.path, self.how = path, how


class Layout(NamedTuple):
    """What all files of a store have in common.

    Attributes:
        context: tokens in a block.
        d_model: width.
        dtype: of the activations, one of `DTYPES`.
    """

    context: int
    d_model: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block at one layer."""
        return self.context * self.d_model * self.dtype.itemsize

    def header(self, num_blocks: int) -> bytes:
        """Return what stands before the tensors of a file with so many blocks."""
        name = DTYPES[str(self.dtype).removeprefix("torch.")]
        sizes: dict[str, tuple[str, list[int], int]] = {
            "blocks": ("I64", [num_blocks], 8 * num_blocks),
            "checksums": ("I64", [num_blocks], 8 * num_blocks),
            "record": ("I64", [1], 8),
            "acts": (
                name, [num_blocks, self.context, self.d_model], num_blocks * self.block_bytes
            ),
        }  # fmt: skip
        described: dict[str, Any] = {}
        place = 0
        for tensor, (dtype, shape, size) in sizes.items():
            end = place + size
            described[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
            place = end
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that all numbers stand where processors want them
        return len(text).to_bytes(8, "little") + text


class Shard:
    """What a whole file holds.

    Attributes:
        path: of the file.
        blocks: which blocks of the split, in the order of the file.
        checksums: of each.
        offset: of the first block's activations in the file, bytes.
        checked: which blocks were found to be as they were written, in this process.
    """

    def __init__(
        self,
        path: Path,
        blocks: Int64[np.ndarray, " block"],
        checksums: Int64[np.ndarray, " block"],
        offset: int,
    ) -> None:
        self.path, self.blocks, self.checksums, self.offset = path, blocks, checksums, offset
        self.checked = np.zeros(len(blocks), dtype=bool)

    def read(self, row: int, out: Shaped[Tensor, "pos d_model"]) -> None:
        """Read a block's activations into `out`, which decides how many bytes; check them once.

        Plain reads, not a memory map: where a disk fails or a file is cut, they end with an error
        and not with the death of the process, and a network file system is asked for whole blocks
        instead of pages.

        Raises:
            Damaged: they are not what was written, or the disk does not give them.
            UserError: they cannot be read for another reason.
        """
        place = _bytes_of(out)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + row * len(place))
                done = 0
                while done < len(place):
                    came = file.readinto(place[done:])
                    if not came:
                        raise Damaged(self.path, "cut short")
                    done += came
        except OSError as error:
            _unreadable(self.path, error)
        if not self.checked[row]:
            if checksum(out) != self.checksums[row]:
                raise Damaged(self.path, f"the checksum of block {self.blocks[row]} is wrong")
            self.checked[row] = True


def read_shard(path: Path, layout: Layout) -> Shard:
    """Return what a file holds, by its header and record; activations are not looked at.

    Raises:
        Damaged: it is not as long as it should be, its record is not what was written, or it
            belongs to another store.
        UserError: it cannot be read for another reason.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise Damaged(path, "its header is wrong")
            text = file.read(length)
            num_blocks = int(json.loads(text)["blocks"]["shape"][0])
            if layout.header(num_blocks)[8:] != text:
                raise Damaged(path, "its header is wrong")
            size, expected = os.fstat(file.fileno()).st_size, _file_size(layout, num_blocks)
            if size != expected:
                raise Damaged(path, f"{size:,} bytes instead of {expected:,}")
            numbers = np.frombuffer(file.read(8 * (2 * num_blocks + 1)), dtype="<i8")
    except OSError as error:
        _unreadable(path, error)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Damaged(path, "its header is wrong") from error
    if _signed(xxhash.xxh3_64_intdigest(numbers[:-1].tobytes())) != numbers[-1]:
        raise Damaged(path, "the checksum of its record is wrong")
    offset = 8 + length + numbers.nbytes
    return Shard(path, numbers[:num_blocks], numbers[num_blocks:-1], offset)


class ShardWriter:
    """Writes a file beside its place, block after block, and puts it there when it is whole.

    Args:
        path: where it will be; its folder is there.
        blocks: which blocks will come.
        layout: of the store.
    """

    def __init__(self, path: Path, blocks: list[int], layout: Layout) -> None:
        self.path, self.layout = path, layout
        self.blocks = np.asarray(blocks, dtype="<i8")
        self.beside = temporary_name(path)
        self.checksums: list[int] = []
        header = layout.header(len(blocks))
        with explain_write_errors(path, "data.cache=<folder>"):
            self.file: IO[bytes] = self.beside.open("wb")
            self.file.write(header + bytes(8 * (2 * len(blocks) + 1)))
        self.record = len(header)

    def add(self, acts: Shaped[Tensor, "block pos d_model"]) -> None:
        """Append the activations of the next blocks, on the host and of the store's dtype.

        Raises:
            UserError: they cannot be written.
        """
        assert acts.dtype == self.layout.dtype
        with explain_write_errors(self.path, "data.cache=<folder>"):
            for block in acts:
                self.checksums.append(checksum(block))
                self.file.write(_bytes_of(block))

    def finish(self) -> None:
        """Put the file in its place.

        Raises:
            UserError: it cannot be written.
        """
        numbers = np.concatenate([self.blocks, np.asarray(self.checksums, dtype="<i8")])
        record = _signed(xxhash.xxh3_64_intdigest(numbers.tobytes()))
        with explain_write_errors(self.path, "data.cache=<folder>"):
            self.file.seek(self.record)
            self.file.write(numbers.tobytes() + record.to_bytes(8, "little", signed=True))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.beside.replace(self.path)

    def discard(self) -> None:
        """Leave nothing behind; after `finish` there is nothing to leave."""
        with suppress(OSError):
            self.file.close()
        self.beside.unlink(missing_ok=True)


def checksum(acts: Shaped[Tensor, "pos d_model"]) -> int:
    """Return XXH3 (64 bits, signed) of the bytes of a block."""
    return _signed(xxhash.xxh3_64_intdigest(_bytes_of(acts)))


def _unreadable(path: Path, error: OSError) -> NoReturn:
    why = error.strerror or str(error)
    if error.errno in OF_THE_FILE:
        raise Damaged(path, why) from error
    raise UserError(
        f"cannot read {path}: {why}. The file may be whole: mend this and give the same command "
        "again."
    ) from error


def _file_size(layout: Layout, num_blocks: int) -> int:
    record = 8 * (2 * num_blocks + 1)
    return len(layout.header(num_blocks)) + record + num_blocks * layout.block_bytes


def _bytes_of(acts: Tensor) -> memoryview:
    flat: Any = acts.contiguous().view(torch.uint8).numpy().reshape(-1)
    return memoryview(flat)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
