"""The files of an evaluation: json for programs, csv for tables, npz for further analysis."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groupsae.evaluation.results import Results
from groupsae.files.atomic import atomic_write, explain_write_errors, write_json

FORMAT = 1
NESTED = ("layers", "density_histogram", "profile")  # of an SAE: too much for a cell of a table
PROFILE = ("mean_max_share", "specific", "mean_effective_layers", "mean_layer")


def begin_evaluation(folder: Path) -> None:
    """Make the folder ready before the work: the results of an earlier one no longer count.

    Raises:
        UserError: nothing can be written there.
    """
    with explain_write_errors(folder, "evaluate a copy of the run"):
        (folder / "latents").mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").unlink(missing_ok=True)
        (folder / "results.csv").touch()


def save_evaluation(
    folder: Path, head: Mapping[str, Any], figures: Mapping[str, Any], results: Results
) -> dict[str, Any]:
    """Write `evaluation.json`, the tables and the sums; return the content of the json."""
    for name, suite in results.sums.saes.items():
        with atomic_write(folder / "latents" / f"{name}.npz") as handle:
            np.savez_compressed(
                handle,
                fired=results.fired(name),
                layers=np.array(suite.layers),
                tokens=results.tokens(name),
            )
    with atomic_write(folder / "sequences.npz") as handle:
        np.savez_compressed(handle, **_sequences(results))  # type: ignore[arg-type]
    _write_csv(folder / "results.csv", [flat(row) for row in figures["results"]])
    clean = {f"{name}_clean": figures[name] for name in ("ce", "retrieval") if name in figures}
    _write_csv(folder / "layers.csv", [flat({**row, **clean}) for row in figures["layers"]])
    _write_csv(folder / "saes.csv", [_sae_row(row) for row in figures["saes"]])
    _write_csv(folder / "groupings.csv", [_grouping_row(row) for row in figures["groupings"]])
    evaluation = {"format": FORMAT, **head, **figures}
    write_json(folder / "evaluation.json", evaluation)  # last: it marks the rest as complete
    return evaluation


def results_file(run: Path, part: str) -> Path:
    """Return the file in a run folder with the results of a part of its evaluation."""
    return run / "evaluation" / ("evaluation.json" if part == "heldout" else f"{part}.json")


def save_part(run: Path, part: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write the results of a part: `<part>.json`, and each of its tables as `<part>_<table>.csv`.

    `groupings` must be among the tables: rows with the name of a `grouping` and what was found
    about it, intervals or values. It is printed, logged and shown in the report; `reporting/
    downstream.py` has the columns. Returns the content of the json.
    """
    file = results_file(run, part)
    content = {"format": FORMAT, **found}
    with explain_write_errors(file.parent, "evaluate a copy of the run"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        for table, rows in tables_in(found).items():
            _write_csv(file.with_name(f"{part}_{table}.csv"), [flat(row) for row in rows])
        write_json(file, content)  # last: it marks the rest as complete
    return content


def tables_in(found: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Return the tables among the results of a part, by name: lists of rows."""
    lists = {name: rows for name, rows in found.items() if isinstance(rows, list) and rows}
    return {name: rows for name, rows in lists.items() if isinstance(rows[0], Mapping)}


def _sae_row(sae: Mapping[str, Any]) -> dict[str, Any]:
    profile = {name: sae["profile"][name] for name in PROFILE}
    plain = flat({name: value for name, value in sae.items() if name not in NESTED})
    return {**plain, "layers": " ".join(map(str, sae["layers"])), **profile}


def _grouping_row(grouping: Mapping[str, Any]) -> dict[str, Any]:
    row = {k: grouping[k] for k in ("name", "kind", "num_groups", "amad", "max_diameter")}
    row |= {f"cost_{k}": v for k, v in (grouping["cost"] or {}).items()}
    row |= flat(grouping["grouped_layers"])
    row |= flat(grouping["against_per_layer"] or {}, "against_")
    return row | flat(grouping["spliced_together"] or {}, "together_")


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a row with three columns for each interval: fvu, fvu_low, fvu_high."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat[prefix + name] = value["value"]
            flat |= {f"{prefix}{name}_{end}": value[end] for end in ("low", "high")}
        else:
            flat[prefix + name] = value
    return flat


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with all columns that any of them has."""
    with atomic_write(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _sequences(results: Results) -> dict[str, np.ndarray]:
    """Return the sums per sequence: enough to compare this evaluation with another, paired."""
    sums = results.sums
    arrays: dict[str, np.ndarray] = {"document": results.bootstrap.owner}
    if sums.predicts:
        arrays |= {"clean_ce": sums.clean["ce"], "predictions": sums.clean["predictions"]}
    losses = ("ce", "kl") if sums.predicts else ("embedding_loss",)
    first = losses[0]
    for layer, effects in sums.layers.items():
        x = effects.sums
        arrays |= {f"{name}/{layer}": x[name] for name in ("count", "sum_squares", "sum_x")}
        arrays |= {f"zero_{first}/{layer}": effects.zero[first]}
        arrays |= {f"mean_{first}/{layer}": effects.mean[first]}
    for (name, layer), pair in sums.pairs.items():
        arrays[f"squared_error/{name}/{layer}"] = pair.reconstruction["squared_error"]
        arrays |= {f"{loss}/{name}/{layer}": pair.effect[loss] for loss in losses}
    return arrays
