"""The checkpoints that the paper's authors published (Hugging Face organisation Group-SAE).

`baseline/layers.N` holds the SAE of one layer, `cluster/kG-cI` the I-th group that first appears
among G groups; a group that several G share was trained once. Folders are those of sparsify at
that time, with `scaling_factors.pt` in them or above them: hookpoint -> factor of its activations
(the paper's norm factor).
"""

import re
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from groupsae.files.reading import require_json
from groupsae.interop.library import (
    ImportedSAE,
    Place,
    imported_sae,
    parse_module_path,
    read_pickled,
)
from groupsae.interop.sparsify import CONFIG, WEIGHTS, read_config, read_weights
from groupsae.runtime.errors import UserError

FACTORS = "scaling_factors.pt"
_CLUSTER = re.compile(r"^k(\d+)-c(\d+)$")
# Layers of the model -> cluster -> its first and last layer (Pythia-160M, 410M and 1B).
CLUSTERS: dict[int, dict[str, tuple[int, int]]] = {
    12: {
        "k1-c0": (0, 10), "k2-c0": (0, 6), "k2-c1": (7, 10), "k3-c0": (3, 6), "k3-c1": (0, 2),
        "k4-c0": (7, 8), "k4-c1": (9, 10), "k5-c0": (5, 6), "k5-c1": (3, 4), "k6-c0": (0, 1),
    },
    24: {
        "k1-c0": (0, 22), "k2-c0": (0, 15), "k2-c1": (16, 22), "k3-c0": (7, 15), "k3-c1": (0, 6),
        "k4-c0": (11, 15), "k4-c1": (7, 10), "k5-c0": (19, 22), "k5-c1": (16, 18),
        "k6-c0": (3, 6), "k6-c1": (0, 2), "k7-c0": (13, 15), "k7-c1": (11, 12), "k8-c0": (3, 4),
        "k8-c1": (5, 6), "k9-c0": (21, 22), "k9-c1": (19, 20), "k10-c0": (7, 8),
        "k10-c1": (9, 10), "k11-c0": (17, 18), "k12-c0": (14, 15), "k13-c0": (1, 2),
    },
    16: {
        "k1-c0": (0, 14), "k2-c0": (0, 8), "k2-c1": (9, 14), "k3-c0": (0, 4), "k3-c1": (5, 8),
        "k4-c0": (9, 12), "k4-c1": (13, 14), "k5-c0": (2, 4), "k5-c1": (0, 1), "k6-c0": (9, 10),
        "k6-c1": (11, 12), "k7-c0": (7, 8), "k7-c1": (5, 6), "k8-c0": (3, 4),
    },
}  # fmt: skip
# Layers of the model -> the layers at which the second, third, ... group begins: one more group
# splits one of the groups before it in two.
BEGINNINGS: dict[int, list[int]] = {
    12: [7, 3, 9, 5, 2, 8, 10, 6, 4],
    24: [16, 7, 11, 19, 3, 13, 5, 21, 9, 17, 14, 1, 22, 4, 18, 20, 8, 6, 15, 10, 12],
    16: [9, 5, 13, 2, 11, 7, 3, 1, 14, 6, 4, 8, 10],
}


def partition(num_groups: int, num_layers: int) -> list[list[int]]:
    """Return the published groups of all layers but the last.

    Raises:
        UserError: none were published for this number of groups or layers of the language model.
    """
    first_layers = BEGINNINGS.get(num_layers)
    if first_layers is None:
        raise UserError(
            f"num_groups={num_groups}: partitions were published for Pythia-160M, 410M and 1B "
            f"(12, 24 and 16 layers), and this model has {num_layers}: choose folders with "
            "only=[...] instead."
        )
    if not 1 <= num_groups <= len(first_layers) + 1:
        raise UserError(
            f"num_groups={num_groups}: for this model, partitions into 1 to "
            f"{len(first_layers) + 1} groups were published."
        )
    edges = [0, *sorted(first_layers[: num_groups - 1]), num_layers - 1]
    return [list(range(first, end)) for first, end in pairwise(edges)]


def choose(folders: list[Path], num_groups: int | None, num_layers: int) -> list[Path]:
    """Return the folders that serve every layer once: of G groups; None: one SAE a layer.

    Raises:
        UserError: a needed folder is missing, or exists twice.
    """
    if num_groups is None:
        return [folder for folder in folders if not _CLUSTER.match(folder.name)] or folders
    by_layers: dict[tuple[int, ...], Path] = {}
    for folder in folders:
        layers = tuple(layers_of(folder, num_layers))
        if layers in by_layers:
            raise UserError(
                f"{by_layers[layers]} and {folder} serve the same layers: give the path of one "
                "repository only, or choose with only=[...] instead of num_groups."
            )
        by_layers[layers] = folder
    groups = partition(num_groups, num_layers)
    for group in groups:
        if tuple(group) not in by_layers:
            cluster = f"the cluster of layers {group[0]} to {group[-1]}"
            needed = f"layers.{group[0]}" if len(group) == 1 else cluster
            raise UserError(
                f"num_groups={num_groups} needs {needed}, which is missing: add its folder, or "
                "choose another num_groups."
            )
    # the last layer is in no partition: it has its own SAE, or none
    return [by_layers[x] for x in map(tuple, [*groups, [num_layers - 1]]) if x in by_layers]


def recognises(folder: Path) -> bool:
    """Return whether this is such a folder: it or one above it holds scaling factors."""
    file = folder / CONFIG
    if not (folder / WEIGHTS).exists() or not file.exists():
        return False
    config = require_json(file)
    theirs = _CLUSTER.match(folder.name) or "jumprelu" in config or _factors_file(folder)
    return "d_in" in config and bool(theirs)


def layers_of(folder: Path, num_layers: int) -> list[int]:
    """Return the layers that a folder's SAE serves.

    Raises:
        UserError: no file and no name shows which.
    """
    place = parse_module_path(folder.name)
    if place is not None:
        return [place.layer]
    for file in (above / "config.json" for above in (folder, *folder.parents[:2])):
        config = require_json(file) if file.exists() else {}
        layers = (config.get("clusters") or {}).get(folder.name)
        if isinstance(layers, list):
            return sorted(int(layer) for layer in layers)
    ends = CLUSTERS.get(num_layers, {}).get(folder.name)
    if ends is None:
        raise UserError(
            f"{folder} does not name the layers that it serves: no config.json above it lists "
            f"clusters, and no cluster of this name was published for a model with {num_layers} "
            "layers."
        )
    return list(range(ends[0], ends[1] + 1))


def read(folder: Path, num_layers: int) -> ImportedSAE:
    """Return the SAE in a folder, with the norm factors of its layers.

    Raises:
        UserError: it is damaged, does what our SAEs cannot, or lacks a norm factor.
    """
    config = read_config(folder)
    layers, k = layers_of(folder, num_layers), config["k"]
    if k > 0:
        kind, tensors = "topk", read_weights(folder)
    elif config.get("jumprelu"):
        kind, tensors = "jumprelu", read_weights(folder, "log_threshold")
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    else:
        kind, tensors = "relu", read_weights(folder)
    place = parse_module_path(folder.name) or Place(layers[0], "resid_post")
    factors = _factors_file(folder)
    unscaled = f"no {FACTORS} in or above its folder: activations are not scaled"
    return imported_sae(
        kind,
        tensors,
        place,
        {"k": k} if kind == "topk" else {},
        norm_factors=_factors(factors, layers, place) if factors else dict.fromkeys(layers, 1.0),
        notes=[] if factors else [unscaled],
    )


def _factors_file(folder: Path) -> Path | None:
    files = (place / FACTORS for place in (folder, *folder.parents[:2]))
    return next((file for file in files if file.exists()), None)


def _factors(file: Path, layers: list[int], of: Place) -> dict[int, float]:
    stored = read_pickled(file)
    if isinstance(stored, Tensor):
        stored = stored.tolist()
    by_layer: dict[int, float] = {}
    for name, value in stored.items() if isinstance(stored, dict) else enumerate(stored):
        place = parse_module_path(str(name))
        if place is None or place.hookpoint == of.hookpoint:
            by_layer[place.layer if place else int(name)] = float(value)
    for layer in layers:
        if not 0 < by_layer.get(layer, 0.0) < float("inf"):
            raise UserError(
                f"{file} has no factor above 0 for layer {layer}; it has layers "
                f"{', '.join(map(str, sorted(by_layer)))}."
            )
    return {layer: by_layer[layer] for layer in layers}
