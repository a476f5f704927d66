"""What an evaluation leaves on disk: json for programs, csv for tables, npz for more analysis."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from groupsae.evaluation.results import Results
from groupsae.files.atomic import atomic_write, write_json
from groupsae.runtime.errors import UserError

FORMAT = 1
NESTED = ("layers", "density_histogram", "profile")  # of an SAE: too much for a cell of a table


def begin_evaluation(folder: Path) -> None:
    """Make the folder ready before the work: what an earlier evaluation found is no longer whole.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        (folder / "latents").mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").unlink(missing_ok=True)
        (folder / "results.csv").touch()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. An evaluation is kept beside its run: "
            "make that folder writable, or copy the run to where you may write."
        ) from error


def save_evaluation(
    folder: Path, head: Mapping[str, Any], figures: Mapping[str, Any], results: Results
) -> dict[str, Any]:
    """Write `evaluation.json`, the tables and the sums; return what is in the json.

    Args:
        folder: `<run>/evaluation`.
        head: where the figures come from.
        figures: of `Results.to_json`.
        results: the rest of what was computed.
    """
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
    write_csv(folder / "results.csv", [_flat(row) for row in figures["results"]])
    clean = _flat({"ce_clean": figures["ce"]})
    write_csv(folder / "layers.csv", [{**_flat(row), **clean} for row in figures["layers"]])
    write_csv(
        folder / "saes.csv",
        [
            {**_flat({k: v for k, v in row.items() if k not in NESTED}), **_profile(row)}
            for row in figures["saes"]
        ],
    )
    write_csv(
        folder / "groupings.csv",
        [
            {
                **{k: row[k] for k in ("name", "kind", "num_groups", "amad", "max_diameter")},
                **{f"cost_{k}": v for k, v in (row["cost"] or {}).items()},
                **_flat(row["grouped_layers"]),
                **{f"against_{k}": v for k, v in _flat(row["against_per_layer"] or {}).items()},
                **{f"together_{k}": v for k, v in _flat(row["spliced_together"] or {}).items()},
            }
            for row in figures["groupings"]
        ],
    )
    evaluation = {"format": FORMAT, **head, **figures}
    write_json(folder / "evaluation.json", evaluation)  # last: it says that the rest is there
    return evaluation


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with all columns that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with three columns for each interval: fvu, fvu_low, fvu_high."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {name: value["value"]}
            flat |= {f"{name}_{end}": value[end] for end in ("low", "high")}
        else:
            flat[name] = value
    return flat


def _profile(sae: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layers of an SAE, and of its profile what fits into cells."""
    profile = sae["profile"]
    kept = ("mean_max_share", "specific", "mean_effective_layers", "mean_layer")
    return {"layers": " ".join(map(str, sae["layers"])), **{k: profile[k] for k in kept}}


def _sequences(results: Results) -> dict[str, np.ndarray]:
    """Return the sums per sequence: enough to compare this evaluation with another, paired."""
    sums = results.sums
    arrays = {
        "document": results.bootstrap.owner,
        "clean_ce": sums.clean_ce.values,
        "predictions": sums.predictions.values,
    }
    for layer, effects in sums.layers.items():
        x = effects.sums
        arrays |= {f"count/{layer}": x.count, f"sum_squares/{layer}": x.sum_squares}
        arrays |= {f"sum_x/{layer}": x.sum_x}
        arrays |= {f"zero_ce/{layer}": effects.zero.ce, f"mean_ce/{layer}": effects.mean.ce}
    for (name, layer), pair in sums.pairs.items():
        arrays[f"squared_error/{name}/{layer}"] = pair.reconstruction.squared_error
        arrays |= {f"ce/{name}/{layer}": pair.effect.ce, f"kl/{name}/{layer}": pair.effect.kl}
    return arrays
