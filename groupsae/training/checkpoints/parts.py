"""Lightning's checkpoint, taken apart into what belongs to each SAE and the rest."""

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from groupsae.training.checkpoints.folder import Damaged, Record, record

STATE = "state.pt"
PREFIX = "groups"  # of the members' names in the state dict


@dataclass(frozen=True)
class Part:
    """One SAE's share of a checkpoint.

    Attributes:
        tensors: weights and counters, as `module/<name>`, and Adam's state of the SAE's n-th
            parameter, as `optimizer/<n>/<name>`.
        options: of its parameter group: its name, its rates; and `num_params`.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]


def file_of(index: int) -> str:
    """Return the name of the file of the plan's SAE number `index`."""
    return f"sae-{index}.safetensors"


def index_of(file: str) -> int:
    """Return the number in the plan of the SAE that has this file.

    Raises:
        Damaged: no SAE's file has such a name.
    """
    named = re.fullmatch(r"sae-(\d+)\.safetensors", file)
    if named is None:
        raise Damaged(f"its manifest names {file!r}, which is no file of an SAE")
    return int(named[1])


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
        places: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part.tensors.items():
            kind, own = name.split("/", 1)
            if kind == "module":
                weights[f"{PREFIX}.{index}.{own}"] = tensor
            else:
                place, value = own.split("/", 1)
                places.setdefault(int(place), {})[value] = tensor
        state |= {number + place: values for place, values in places.items()}
        count = part.options["num_params"]
        options = {k: v for k, v in part.options.items() if k != "num_params"}
        groups.append({**options, "params": list(range(number, number + count))})
        number += count
    return {
        **rest,
        "state_dict": weights,
        "optimizer_states": [{"state": state, "param_groups": groups}],
    }


def write_parts(folder: Path, parts: Mapping[int, Part]) -> dict[str, Record]:
    """Write one file for each SAE; return what the manifest says of each."""
    records = {}
    for index, part in parts.items():
        file = folder / file_of(index)
        tensors = {name: tensor.detach().contiguous() for name, tensor in part.tensors.items()}
        # (save_file would make it readable by its owner only, whatever the umask)
        file.write_bytes(save(tensors, metadata={"options": json.dumps(part.options)}))
        records[file.name] = record(file)
    return records


def write_rest(folder: Path, rest: Mapping[str, Any]) -> dict[str, Record]:
    """Write what belongs to no SAE; return what the manifest says of it."""
    file = folder / STATE
    written = io.BytesIO()  # into a file, torch would tell of a full disk as a RuntimeError
    torch.save(dict(rest), written)
    file.write_bytes(written.getbuffer())
    return {file.name: record(file)}


def read_parts(folder: Path, indices: Iterable[int]) -> dict[int, Part]:
    """Return the parts of some SAEs, on the CPU."""
    parts = {}
    for index in indices:
        with safe_open(folder / file_of(index), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            parts[index] = Part(tensors, json.loads(stored.metadata()["options"]))
    return parts


def read_rest(folder: Path) -> dict[str, Any]:
    """Return what belongs to no SAE; nothing in it can run code."""
    rest: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return rest
