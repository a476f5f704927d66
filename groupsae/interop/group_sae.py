"""The checkpoints that the paper's authors published (Hugging Face organisation Group-SAE).

`baseline/layers.N` holds the SAE of one layer, `cluster/kG-cI` the I-th group that first appears
among G groups; a group that several G share was trained once. Folders are sparsify's of its time,
with `scaling_factors.pt` beside or above them: hookpoint -> what its activations are multiplied by
(the paper's norm factor).
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from groupsae.files.reading import require_json
from groupsae.interop.format import Incoming
from groupsae.interop.names import parse_module_path
from groupsae.interop.sparsify import CONFIG, WEIGHTS, ours
from groupsae.runtime.errors import UserError
from groupsae.suite.tensors import number, read_pickled, section

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
# splits one of those before it in two.
BEGINNINGS: dict[int, list[int]] = {
    12: [7, 3, 9, 5, 2, 8, 10, 6, 4],
    24: [16, 7, 11, 19, 3, 13, 5, 21, 9, 17, 14, 1, 22, 4, 18, 20, 8, 6, 15, 10, 12],
    16: [9, 5, 13, 2, 11, 7, 3, 1, 14, 6, 4, 8, 10],
}


def partition(num_groups: int, num_layers: int) -> list[list[int]]:
    """Return the published groups of all layers but the last.

    Args:
        num_groups: G.
        num_layers: of the language model.

    Raises:
        UserError: none were published.
    """
    begin = BEGINNINGS.get(num_layers)
    if begin is None:
        raise UserError(
            f"num_groups={num_groups}: partitions were published for Pythia-160M, 410M and 1B, "
            f"of 12, 24 and 16 layers, and this model has {num_layers}. Choose folders by "
            "only=[...] instead."
        )
    if not 1 <= num_groups <= len(begin) + 1:
        raise UserError(
            f"num_groups={num_groups}: for this model 1 to {len(begin) + 1} groups were published."
        )
    edges = [0, *sorted(begin[: num_groups - 1]), num_layers - 1]
    return [list(range(first, end)) for first, end in pairwise(edges)]


def choose(folders: list[Path], num_groups: int | None, num_layers: int) -> list[Path]:
    """Return the folders that serve every layer once: of G groups, or of one SAE a layer.

    Args:
        folders: that were found.
        num_groups: None: the baseline.
        num_layers: of the language model.

    Raises:
        UserError: one that is needed is not there, or is there twice.
    """
    if num_groups is None:
        return [folder for folder in folders if not _CLUSTER.match(folder.name)] or folders
    serving: dict[tuple[int, ...], Path] = {}
    for folder in folders:
        layers = tuple(layers_of(folder, num_layers))
        if layers in serving:
            raise UserError(
                f"{serving[layers]} and {folder} serve the same layers: give the path of one "
                "repository only, or choose with only=[...] in place of num_groups."
            )
        serving[layers] = folder
    chosen = []
    for group in [*partition(num_groups, num_layers), [num_layers - 1]]:
        found = serving.get(tuple(group))
        last = group == [num_layers - 1]  # in no partition: its own SAE, if there is one
        if found is None and not last:
            name = f"layers.{group[0]}"
            what = name if len(group) == 1 else f"a cluster of layers {group[0]} to {group[-1]}"
            raise UserError(f"num_groups={num_groups} needs {what}, which is not there.")
        chosen += [found] if found is not None else []
    return chosen


def mine(folder: Path) -> bool:
    """Return whether this is such a folder: it or one above it holds scaling factors."""
    file = folder / CONFIG
    if not (folder / WEIGHTS).exists() or not file.exists() or "d_in" not in require_json(file):
        return False
    named = _CLUSTER.match(folder.name) is not None
    return named or "jumprelu" in require_json(file) or _factors_file(folder) is not None


def layers_of(folder: Path, num_layers: int) -> list[int]:
    """Return the layers that a folder's SAE serves.

    Raises:
        UserError: that is written nowhere.
    """
    place = parse_module_path(folder.name)
    if place is not None:
        return [place[0]]
    for above in (folder, *folder.parents[:2]):
        clusters = require_json(above / "config.json") if (above / "config.json").exists() else {}
        known = section(clusters, "clusters", above / "config.json").get(folder.name)
        if isinstance(known, list):
            return sorted(int(layer) for layer in known)
    ends = CLUSTERS.get(num_layers, {}).get(folder.name)
    if ends is None:
        raise UserError(
            f"{folder} does not say which layers it serves: its name is no published cluster of a "
            f"model with {num_layers} layers, and no config.json above it lists clusters."
        )
    return list(range(ends[0], ends[1] + 1))


def read(folder: Path, num_layers: int) -> Incoming:
    """Return the SAE in a folder, with the norm factors of its layers.

    Args:
        folder: of one SAE.
        num_layers: of the language model.

    Raises:
        UserError: it is damaged, or lacks a norm factor.
    """
    config, file = require_json(folder / CONFIG), folder / CONFIG
    layers, k = layers_of(folder, num_layers), config.get("k", 0)
    kind = "topk" if isinstance(k, int) and k > 0 else "relu"
    kind = "jumprelu" if kind == "relu" and config.get("jumprelu") else kind
    extra = ("log_threshold",) if kind == "jumprelu" else ()
    tensors = ours(folder, config, *extra)
    if kind == "jumprelu":
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    n = len(tensors["b_enc"])
    stored = _factors_file(folder)
    unscaled = f"no {FACTORS} beside or above it: activations are not scaled"
    return Incoming.of(
        kind,
        tensors,
        sized={"k": number(config, "k", file, latents=n)} if kind == "topk" else {},
        notes=[unscaled] if stored is None else [],
        folder=folder,
        format="group-sae",
        norm_factors=_factors(stored, layers),
        hookpoint="resid_post",
    )


def _factors_file(folder: Path) -> Path | None:
    places = (folder, *folder.parents[:2])
    return next((p / FACTORS for p in places if (p / FACTORS).exists()), None)


def _factors(file: Path | None, layers: list[int]) -> dict[int, float]:
    if file is None:
        return dict.fromkeys(layers, 1.0)
    stored: Any = read_pickled(file)
    if isinstance(stored, Tensor):
        stored = stored.tolist()
    values = stored.items() if isinstance(stored, dict) else enumerate(stored)
    known: dict[int, float] = {}
    for name, value in values:
        place = parse_module_path(str(name))
        known[place[0] if place else int(name)] = float(value)
    missing = [layer for layer in layers if not 0 < known.get(layer, 0.0) < float("inf")]
    if missing:
        raise UserError(
            f"{file} has no factor above 0 for layer {missing[0]}; it has layers "
            f"{', '.join(map(str, sorted(known)))}."
        )
    return {layer: known[layer] for layer in layers}
