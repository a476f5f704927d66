"""One file of stored activations: some blocks of tokens at one layer, complete or not there.

It is an ordinary safetensors file, `safetensors.torch.load_file` reads it, with four tensors:

| tensor | shape | what |
|---|---|---|
| `blocks` | int64 [block] | which blocks of the packed corpus' split |
| `checksums` | int64 [block] | XXH3 of the bytes of each block's activations |
| `record` | int64 [1] | XXH3 of the bytes of the two above |
| `acts` | [block, pos, d_model] | their activations, unfiltered |

So the record and the activations are one file, and no kill separates them. Checksums are by block
because a run reads block by block, in shuffled order: to check a block costs what it costs to read
it, whereas with one checksum per file all files would be read for the first step.
"""

import errno
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import xxhash
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from groupsae.files.atomic import atomic_write
from groupsae.runtime.errors import UserError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # torch's names, safetensors'
OF_THE_FILE = (errno.ENOENT, errno.EIO)  # errors that end when the file is written again


class Damaged(Exception):
    """A file of stored activations differs from its checksums."""

    def __init__(self, path: Path, how: object) -> None:
        super().__init__(f"{path} is damaged ({how})")
        self.path = path


class Layout(NamedTuple):
    """What all files of a store have in common."""

    context: int
    d_model: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block at one layer."""
        return self.context * self.d_model * self.dtype.itemsize


class Shard:
    """A file, opened; blocks are verified when they are read for the first time.

    Attributes:
        blocks: blocks of the split, in the order of the file.

    Raises:
        Damaged: it is truncated, its record is not what was written, or it belongs to another
            store. Activations are not read for this.
        UserError: it cannot be read for another reason.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
            with safe_open(path, framework="numpy") as tensors:
                self.blocks, self.checksums, record = (
                    tensors.get_tensor(name) for name in ("blocks", "checksums", "record")
                )
                acts = tensors.get_slice("acts")
                shape, dtype = tuple(acts.get_shape()), acts.get_dtype()
        except OSError as error:
            _unreadable(path, error)
        except SafetensorError as error:
            raise Damaged(path, error) from error
        if record.tolist() != [_digest(self.blocks.tobytes() + self.checksums.tobytes())]:
            raise Damaged(path, "the checksum of its record is wrong")
        num_blocks = len(self.blocks)
        of_layout = DTYPES[str(layout.dtype).removeprefix("torch.")]
        if (shape, dtype) != ((num_blocks, layout.context, layout.d_model), of_layout):
            raise Damaged(path, "it belongs to another store")
        # safetensors puts the narrowest dtype last
        self._offset = size - num_blocks * layout.block_bytes
        self.verified = np.zeros(num_blocks, dtype=bool)

    def read(self, row: int, out: Shaped[Tensor, "pos d_model"]) -> None:
        """Read a block's activations into `out`, and verify them once in this process.

        Plain reads, not a memory map: where a disk fails or a file was truncated, they end with
        an error, and not with the process.

        Raises:
            Damaged: they are not what was written, or the disk does not give them.
            UserError: they cannot be read for another reason.
        """
        place = _bytes_of(out)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._offset + row * len(place))
                done = 0
                while done < len(place):
                    count = file.readinto(place[done:])
                    if not count:
                        raise Damaged(self.path, "it is truncated")
                    done += count
        except OSError as error:
            _unreadable(self.path, error)
        if not self.verified[row]:
            if _digest(place) != self.checksums[row]:
                raise Damaged(self.path, f"the checksum of block {self.blocks[row]} is wrong")
            self.verified[row] = True


def write_shard(path: Path, blocks: list[int], acts: Shaped[Tensor, "block pos d_model"]) -> None:
    """Write a file, which is in its place when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    numbers = np.array([blocks, [_digest(_bytes_of(block)) for block in acts]], dtype=np.int64)
    record = np.array([_digest(numbers.tobytes())])
    tensors = {"blocks": numbers[0], "checksums": numbers[1], "record": record}
    content = save({**{k: torch.from_numpy(v) for k, v in tensors.items()}, "acts": acts})
    with atomic_write(path, shared=True, hint="data.cache=<folder>") as file:
        file.write(content)


def _unreadable(path: Path, error: OSError) -> NoReturn:
    why = error.strerror or str(error)
    if error.errno in OF_THE_FILE:
        raise Damaged(path, why) from error
    raise UserError(
        f"cannot read {path}: {why}. The file may be complete: remove the cause and give the same "
        "command again."
    ) from error


def _bytes_of(acts: Tensor) -> memoryview:
    flat: Any = acts.contiguous().view(torch.uint8).numpy().reshape(-1)
    return memoryview(flat)


def _digest(content: bytes | memoryview) -> int:
    """Return XXH3 (64 bits), as a signed number."""
    digest: int = xxhash.xxh3_64_intdigest(content)
    return digest - 2**64 if digest >= 2**63 else digest
