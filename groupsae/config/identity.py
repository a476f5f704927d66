"""Which values of a configuration decide the result, and which may differ between two starts."""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

FORMAT = 3  # version of the run folder: its configuration and its files
# where and how fast a run computes, its logging, and measurements afterwards
RUNTIME = (
    "trainer",
    "logger",
    "callbacks",
    "output",
    "resume",
    "overwrite",
    "dry_run",
    "interpret",
    "interpretation",
    "log_every",
    "checkpoint_every",
    "evaluate",
    "evaluation",
    "nonfinite",  # decides nothing until such a step comes, and then the run stops or skips it
    "data.cache",  # its place; that activations are stored is known from data.cache_dtype
    "stream.num_workers",
    "stream.blocks_per_forward",
)
# what earlier versions lacked, with the value at which nothing differs: folders keep their names
LATER = {
    ("stream", "layers_per_token"): 1,
    ("sae", "layer_bias"): "shared",
    ("sae", "layer_rank"): 0,
}
PLACE = ("accelerator", "devices", "num_nodes", "strategy", "precision", "profiler")
OURS = ("groupsae.", "lightning.pytorch.callbacks.ModelCheckpoint")  # callbacks of conf/callbacks


def content(values: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the part of a configuration that decides the result.

    That is everything but `RUNTIME`. Of the trainer and the callbacks it has what a user added:
    options of Lightning's that are neither a place nor a display, classes that are not ours.
    Activations from a store were rounded to its dtype, which decides nothing without a store.
    """
    stored = (values.get("data") or {}).get("cache") is not None
    kept = without(values, (*RUNTIME, *ignored, *(() if stored else ("data.cache_dtype",))))
    for (node, key), off in LATER.items():
        if (kept.get(node) or {}).get(key) == off:
            del kept[node][key]
    trainer = {
        key: value
        for key, value in (values.get("trainer") or {}).items()
        if key not in PLACE and not key.startswith("enable_")
    }
    callbacks = {
        name: node
        for name, node in (values.get("callbacks") or {}).items()
        if node and not str(node.get("_target_")).startswith(OURS)
    }
    added = {"trainer": trainer, "callbacks": callbacks}
    return {**kept, "run_format": FORMAT, **{key: v for key, v in added.items() if v}}


def content_hash(values: Mapping[str, Any]) -> str:
    """Return 8 hex digits over `content`."""
    return hashlib.sha256(json.dumps(content(values), sort_keys=True).encode()).hexdigest()[:8]


def without(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return plain values without some dotted keys, whether or not they have them."""
    kept = deepcopy(dict(values))
    for key in keys:
        *parents, last = key.split(".")
        holder: Any = kept
        for parent in parents:
            holder = holder.get(parent, {})
        holder.pop(last, None)
    return kept
