"""Which values of a configuration decide the result, and which may differ between two starts."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# where and how fast a run computes, who watches, and what is measured afterwards
RUNTIME = (
    "trainer",
    "logger",
    "output",
    "resume",
    "overwrite",
    "dry_run",
    "log_every",
    "checkpoint_every",
    "evaluate",
    "evaluation",
    "nonfinite",  # without such a step there is no difference, and after one a stopped run goes on
    "data.cache",  # whose place is no matter; that there is one is said by data.cache_dtype
    "stream.num_workers",
    "stream.blocks_per_forward",
)


def decisive(values: Mapping[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the plain values that decide the result, without some more dotted keys.

    Activations that are read from a store were rounded to its dtype; without a store that dtype
    decides nothing.
    """
    stored = (values.get("data") or {}).get("cache") is not None
    return without(values, (*RUNTIME, *more, *(() if stored else ("data.cache_dtype",))))


def without(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return plain values without some dotted keys; those that are not there are no matter."""
    kept = deepcopy(dict(values))
    for key in keys:
        *parents, last = key.split(".")
        holder: Any = kept
        for parent in parents:
            holder = holder.get(parent, {})
        holder.pop(last, None)
    return kept
