"""A suite as a table: in a notebook, and on its page on the Hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd  # type: ignore[import-untyped,unused-ignore]

from groupsae.files.reading import read_json
from groupsae.interop.library import kind_of
from groupsae.sae.base import SAE
from groupsae.suite.suite import EVALUATION, SUMMARY

HEADINGS = {
    "sae": "SAE",
    "layers": "layers",
    "kind": "kind",
    "d_sae": "latents",
    "tokens": "tokens",
    "fvu": "FVU",
    "l0": "L0",
}
UNKNOWN = "-"


def table_of(
    saes: Mapping[str, SAE], configs: Mapping[str, Mapping[str, Any]], run: Path | None
) -> pd.DataFrame:
    """Return a row for each SAE, with the columns of `HEADINGS`; None where a value is unknown.

    FVU and L0 are those of the run's summary, on validation text; of imported SAEs, the means
    over their layers of the run's evaluation.
    """
    summary = (read_json(run / SUMMARY) if run else None) or {}
    evaluation = (read_json(run / EVALUATION) if run else None) or {}
    results: dict[str, list[Mapping[str, Any]]] = {}
    for row in evaluation.get("results", []):
        results.setdefault(row["sae"], []).append(row)

    def metric(name: str, key: str) -> float | None:
        summarised = (summary.get("groups") or {}).get(name) or {}
        if key in summarised:
            return float(summarised[key])
        values = [value_of(row.get(key)) for row in results.get(name, [])]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    rows = [
        {
            "sae": name,
            "layers": list(configs[name]["layers"]),
            "kind": described(sae),
            "d_sae": sae.d_sae,
            "tokens": configs[name].get("tokens"),
            "fvu": metric(name, "fvu"),
            "l0": metric(name, "l0"),
        }
        for name, sae in saes.items()
    ]
    return pd.DataFrame(rows, columns=list(HEADINGS), dtype=object)


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `table_of` with its values as text, for the reader."""
    write = {
        "layers": span,
        "d_sae": "{:,}".format,
        "tokens": "{:,}".format,
        "fvu": "{:.4f}".format,
        "l0": "{:.1f}".format,
    }
    written = {
        name: [UNKNOWN if value is None else write.get(name, str)(value) for value in column]
        for name, column in table.items()
    }
    return pd.DataFrame(written)


def described(sae: SAE) -> str:
    """Return the kind of an SAE, with k where it has one: `topk, k = 64`, and what layers own."""
    k = getattr(sae, "k", None)
    return kind_of(sae) + (f", k = {k}" if k is not None else "") + sae.own


def span(layers: Sequence[int]) -> str:
    """Return `3` for one layer, `3-10` for adjacent ones and `3, 5` for others.

    >>> span([3]), span([3, 4, 5]), span([3, 5])
    ('3', '3-5', '3, 5')
    """
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def value_of(stored: Any) -> float | None:
    """Return a number that is stored alone, or as the value of an estimate."""
    value = stored.get("value") if isinstance(stored, Mapping) else stored
    return None if value is None else float(value)
