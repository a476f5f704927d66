"""A checkpoint is a folder: a file for each SAE, one for the rest, and a manifest of both.

It is written next to its place and renamed, so it is complete or absent, and verified when read.
torch is imported where it is used: commands list checkpoints before anything slow is loaded.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from groupsae.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KEPT = 2  # number of checkpoints to keep: a second one, if the newest is damaged
MANIFEST = "manifest.json"
STATE = "state.pt"
PREFIX = "groups"  # of the SAEs' names in the state dict
_NAME = re.compile(r"step=(\d+)\.ckpt")
_SAE = re.compile(r"sae-(\d+)\.safetensors")

Record = dict[str, Any]  # bytes and SHA-256 of one file


class Damaged(Exception):
    """A checkpoint that differs from its manifest; the message names the difference."""


class Part(NamedTuple):
    """One SAE's share of a checkpoint."""

    # `module/<name>`: weights and counters; `optimizer/<n>/<name>`: Adam's, of parameter n
    tensors: "dict[str, Tensor]"
    options: dict[str, Any]  # of its parameter group: its name, its rates; and `num_params`


# ---- Lightning's checkpoint, in parts ---------------------------------------------------------


def take_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, Part]]:
    """Return the rest of a checkpoint and the parts of its SAEs by their number in the plan."""
    rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    modules: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint["state_dict"].items():
        prefix, index, own = name.split(".", 2)
        assert prefix == PREFIX, name
        modules.setdefault(int(index), {})[f"module/{own}"] = tensor
    nothing: dict[str, Any] = {"state": {}, "param_groups": []}  # a process without an SAE
    (optimizer,) = checkpoint["optimizer_states"] or [nothing]
    parts = {}
    for (index, tensors), group in zip(modules.items(), optimizer["param_groups"], strict=True):
        for place, number in enumerate(group["params"]):
            for name, value in optimizer["state"].get(number, {}).items():
                tensors[f"optimizer/{place}/{name}"] = value
        options = {k: v for k, v in group.items() if k != "params"}
        parts[index] = Part(tensors, {**options, "num_params": len(group["params"])})
    return rest, parts


def put_together(rest: Mapping[str, Any], parts: Mapping[int, Part]) -> dict[str, Any]:
    """Return the checkpoint of a suite that has these SAEs, as Lightning restores it."""
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for index, part in sorted(parts.items()):
        for name, tensor in part.tensors.items():
            kind, own = name.split("/", 1)
            if kind == "module":
                weights[f"{PREFIX}.{index}.{own}"] = tensor
            else:
                place, value = own.split("/", 1)
                state.setdefault(number + int(place), {})[value] = tensor
        options = dict(part.options)
        end = number + options.pop("num_params")
        groups.append({**options, "params": list(range(number, end))})
        number = end
    optimizer = {"state": state, "param_groups": groups}
    return {**rest, "state_dict": weights, "optimizer_states": [optimizer]}


# ---- folders ----------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the highest step first, damaged ones included.

    Raises:
        UserError: the folder exists but cannot be read.
    """
    try:
        paths = list(folder.iterdir())  # (glob takes a folder that it cannot read for empty)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot read {folder}: {error.strerror or error}. Fix that, and the same command "
            "resumes from the last checkpoint there."
        ) from error
    named = ((_NAME.fullmatch(path.name), path) for path in paths)
    found = {int(name[1]): path for name, path in named if name}
    return [found[step] for step in sorted(found, reverse=True)]


def partial_of(path: Path) -> Path:
    """Return where a checkpoint is written before it counts."""
    return path.with_suffix(".partial")


def remove(path: Path) -> None:
    """Remove a checkpoint, if it exists; it ceases to count in one step."""
    if path.exists():
        path.rename(partial_of(path))
        shutil.rmtree(partial_of(path), ignore_errors=True)


# ---- writing: begin, write, seal --------------------------------------------------------------


def begin(path: Path) -> None:
    """Make an empty folder for a new checkpoint next to its place."""
    for leftover in path.parent.glob("*.partial"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial_of(path).mkdir(parents=True)


def write(
    path: Path, parts: Mapping[int, Part], rest: Mapping[str, Any] | None
) -> dict[str, Record]:
    """Write one file for each SAE, and one for the rest if given; return their records.

    The files go into `partial_of(path)`.
    """
    import torch
    from safetensors.torch import save

    records: dict[str, Record] = {}
    for index, part in parts.items():
        tensors = {name: tensor.detach().contiguous() for name, tensor in part.tensors.items()}
        # (save_file would make it readable by its owner only, whatever the umask)
        content = save(tensors, metadata={"options": json.dumps(part.options)})
        records |= _write_file(partial_of(path) / file_of(index), content)
    if rest is not None:
        buffer = io.BytesIO()  # into a file, torch would report a full disk as a RuntimeError
        torch.save(dict(rest), buffer)
        records |= _write_file(partial_of(path) / STATE, buffer.getbuffer())
    return records


def _write_file(file: Path, content: bytes | memoryview) -> dict[str, Record]:
    """Bring a file to disk; return its record for the manifest, of the content on disk."""
    file.write_bytes(content)
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {file.name: {"bytes": file.stat().st_size, "sha256": digest}}


def seal(path: Path, records: Mapping[str, Record]) -> None:
    """Write the manifest and make the checkpoint count: the folder gets its name in one step.

    Then all but the newest are removed, so a run that is stopped and resumed many times leaves
    as few as one that is not.
    """
    partial = partial_of(path)
    manifest = {"format": FORMAT, "files": records, "sha256": _digest(records)}
    with (partial / MANIFEST).open("w") as handle:
        handle.write(json.dumps(manifest, indent=1))
        handle.flush()
        os.fsync(handle.fileno())
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)
    for old in checkpoints(path.parent)[KEPT:]:
        if old != path:
            remove(old)


# ---- reading ----------------------------------------------------------------------------------


def read(path: Path, members: Sequence[int] | None) -> dict[str, Any]:
    """Return a verified checkpoint, on the CPU; nothing in it can run code.

    Read are the SAEs with the numbers `members` in the plan; all with None.

    Raises:
        Damaged: it differs from its manifest.
        OSError: a file is missing or cannot be read.
        UserError: it lacks one of the SAEs.
    """
    import torch
    from safetensors import safe_open

    records = _manifest(path)
    every = [int(named[1]) for name in records if (named := _SAE.fullmatch(name))]
    wanted = every if members is None else members
    if set(wanted) - set(every):
        raise UserError(
            f"{path} contains {len(every)} SAEs, but groups.json now asks for others: restore the "
            "groups.json of that checkpoint, or start the run again with overwrite=true."
        )
    parts = {}
    for name in (STATE, *map(file_of, wanted)):
        with (path / name).open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != records[name]["sha256"]:
            raise Damaged(f"the checksum of {name} is wrong")
    for index in wanted:
        with safe_open(path / file_of(index), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            parts[index] = Part(tensors, json.loads(stored.metadata()["options"]))
    rest = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return put_together(rest, parts)


def file_of(index: int) -> str:
    """Return the name of the file of the plan's SAE number `index`."""
    return f"sae-{index}.safetensors"


def _manifest(path: Path) -> dict[str, Record]:
    """Return file -> record of a checkpoint, whose files have the sizes recorded."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, Record] = manifest["files"]
        if manifest["format"] != FORMAT:
            raise Damaged(f"it has format {manifest['format']}, not {FORMAT}")
        if manifest["sha256"] != _digest(files):
            raise Damaged(f"the checksum of {MANIFEST} is wrong")
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return files


def _digest(records: Mapping[str, Record]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
