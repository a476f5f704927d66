"""Writes run folders as training and evaluation leave them, with made-up figures."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

METRICS = ("fvu", "delta_ce", "delta_ce_percent", "kl")
LAYERS, D_MODEL, D_SAE, K, CHOSEN = 12, 128, 1024, 16, 2

CONFIG = """\
model:
  _target_: groupsae.lm.load.FrozenLM
  name: tiny
groups:
  _target_: groupsae.grouping.choices.{choice}
  theta: 0.2
stream:
  context: 256
  blocks_per_step: 8
tokens: 1024000
seed: {seed}
note: <script>alert("no & never")</script>
output: outputs
"""


def distances() -> np.ndarray:
    """Return angles between 12 layers such as real ones: near 0 for late neighbours."""
    place = np.cumsum([0, 0.15, 0.07, 0.09, 0.04, 0.05, 0.04, 0.05, 0.02, 0.03, 0.04, 0.09])
    square = np.abs(place[:, None] - place[None, :])
    return 0.36 * square / (0.25 + square)


def near(value: float, half: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def write_run(
    folder: Path,
    *,
    every: bool = False,
    evaluated: bool = True,
    even_gap: float = 0.02,
    width: float = 0.004,
    seed: int = 0,
) -> Path:
    """Write a finished run.

    Args:
        folder: of the run.
        every: as groups=all with two rules and smaller SAEs, else one grouping.
        evaluated: with evaluation/ and the latents.
        even_gap: how much worse even spacing is than complete linkage, in FVU and delta_ce.
        width: half of every confidence interval.
        seed: shifts the figures a little.
    """
    from groupsae.grouping.plan import GroupPlan
    from groupsae.grouping.rules import curve

    square = distances()
    grouped = square[: LAYERS - 1, : LAYERS - 1]
    parts = {rule: curve(grouped, rule) for rule in ("complete", "even")}
    chosen = parts["complete"][CHOSEN - 1]
    own = [[LAYERS - 1]]
    others = tuple(part for curve in parts.values() for part in curve) if every else ()
    smaller = (CHOSEN,) if every else ()
    plan = GroupPlan(chosen, "own", LAYERS, 0.2, others, smaller)
    folder.mkdir(parents=True)
    (folder / ".hydra").mkdir()
    config = CONFIG.format(seed=seed, choice="All" if every else "ByAmad")
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text(f"- seed={seed}\n")
    _json(
        folder / "groups.json",
        {
            "plan": plan.to_json(),
            "saes": {},
            "measured": {"model": "tiny", "tokens": 200704, "context": 256},
        },
    )
    np.savez(folder / "angles.npz", distances=square, rms_norms=np.linspace(1, 9, LAYERS))
    names = [_name(g) for g in chosen.groups + own]
    with (folder / "metrics.csv").open("w", newline="") as handle:
        rows = [["step", "metric", "value"]]
        for step in (150, 300, 450, 500):
            for i, name in enumerate(names):
                rows.append([step, f"val/fvu/{name}", 0.1 + 0.04 * i + 20 / step])
                rows.append([step, f"train/dead/{name}", 0.5 * np.exp(-step / 100)])
        csv.writer(handle).writerows(rows)
    _json(
        folder / "summary.json",
        {
            "folder": str(folder),
            "groups": {
                name: {"fvu": 0.1 + 0.05 * i, "l0": 16.0, "dead": 0.001, "layers": layers}
                | {"tokens_per_layer": {x: 1024000 // len(layers) for x in layers}}
                for i, (name, layers) in enumerate(zip(names, chosen.groups + own, strict=True))
            },
            "chosen": names,
            "fvu": 0.186,
            "tokens": 1024000,
            "steps": 500,
            "tokens_per_second": 6888.0,
            "seconds_training": 150.0,
            "peak_memory_gb": 0.8,
            "cost": {"saving": 0.346, "paper_saving": 0.595},
            "groupsae": "0.1.0",
        },
    )
    _json(folder / "ledger.json", LEDGER | {"sharing": SHARING if every else None})
    if evaluated:
        _evaluate(folder, parts, every, even_gap, width, seed)
    return folder


LEDGER: dict[str, Any] = {
    "device": "cpu",
    "threads": 2,
    "tokens": 1024000,
    "num_saes": 3,
    "parts": [
        {"part": part, "planned_flops": planned, "measured_flops": measured, "seconds": seconds}
        for part, planned, measured, seconds in (
            ("activations", 5.2e12, 5.3e12, 61.0),
            ("distances", 1.1e12, 1.1e12, 9.5),
            ("saes", 1.7e12, 1.9e12, 88.0),
            ("validation", None, 4.0e11, 6.2),
            ("other", None, None, 3.0),
        )
    ],
    "per_layer": {"planned_flops": 1.2e13, "seconds": 310.0},
    "saving": {"paper": 0.595, "paper_both_sides": 0.54, "flops": 0.346, "seconds": 0.41},
}
SHARING = {
    "groupings": 22,
    "seconds": 620.0,
    "seconds_separately": 4100.0,
    "factor": 6.6,
    "bound_seconds": 700.0,
}


def _evaluate(
    folder: Path, parts: dict[str, Any], every: bool, gap: float, width: float, seed: int
) -> None:
    own = [LAYERS - 1]
    groupings: list[dict[str, Any]] = []
    saes: dict[str, dict[str, Any]] = {}
    seen: dict[str, dict[str, Any]] = {}
    for rule, curve in parts.items() if every else [("complete", parts["complete"])]:
        for part in curve:
            g = part.num_groups
            if not every and g != CHOSEN:
                continue
            if str(part.groups) in seen:
                seen[str(part.groups)]["rules"].append(rule)
                continue
            fvu = 0.12 + 0.5 * part.amad**1.3 + (gap if rule == "even" else 0) + 0.001 * seed
            single = g == LAYERS - 1
            grouping = _grouping(
                "per_layer" if single else f"{rule}-{g}",
                "per_layer" if single else "groups",
                [rule],
                g,
                part,
                fvu,
                width,
                {x: _name(group) for group in [*part.groups, own] for x in group},
            )
            grouping["chosen_by"] = [rule] if g == CHOSEN and rule == "complete" else []
            seen[str(part.groups)] = grouping
            groupings.append(grouping)
    if every:
        sae_of_layer = {x: f"layers.{x}.smaller-{CHOSEN}" for x in range(LAYERS - 1)}
        sae_of_layer[LAYERS - 1] = _name(own)
        groupings.append(
            _grouping(f"smaller-{CHOSEN}", "smaller", [], CHOSEN, None, 0.22, width, sae_of_layer)
        )
    groupings.sort(key=lambda g: not g["chosen_by"])  # the chosen one comes first
    base = next((g for g in groupings if g["kind"] == "per_layer"), None)
    for grouping in groupings:
        for layer, name in grouping["sae_of_layer"].items():
            saes.setdefault(name, {"layers": set()})["layers"].add(int(layer))
        if base is None or grouping is base:
            grouping["against_per_layer"] = None
        else:
            grouping["against_per_layer"] = {
                key: near(
                    grouping["grouped_layers"][key]["value"]
                    - base["grouped_layers"][key]["value"],
                    width / 2,
                )
                for key in METRICS
            }
    (folder / "evaluation" / "latents").mkdir(parents=True)
    results, latents = [], []
    rng = np.random.default_rng(0)
    for name, sae in saes.items():
        layers = sorted(sae["layers"])
        fired = _fired(rng, len(layers))
        np.savez(
            folder / "evaluation" / "latents" / f"{name}.npz",
            fired=fired,
            layers=np.array(layers),
            tokens=np.full(len(layers), 32768),
        )
        density = np.log10(np.maximum(fired.sum(0), 1) / 32768 / len(layers))
        counts, edges = np.histogram(density, bins=np.arange(-5, 0.5, 0.25))
        latents.append(
            {
                "name": name,
                "layers": layers,
                "d_sae": D_SAE,
                "architecture": "TopK",
                "width": 0.18 if "smaller" in name else 1.0,
                "tokens": 1024000,
                "fvu": near(0.1 + 0.01 * len(layers), width),
                "delta_ce": near(0.02, width / 2),
                "dead": 0.0,
                "dense": 0.004,
                "density_histogram": {
                    "edges": edges.tolist(),
                    "counts": counts.tolist(),
                    "never": 3,
                },
                "profile": None
                if len(layers) == 1
                else {"specific": 0.22, "mean_effective_layers": 2.1, "never": 3},
            }
        )
        for layer in layers:
            fvu = 0.1 + 0.008 * layer + 0.01 * len(layers)
            results.append(
                {
                    "sae": name,
                    "layer": layer,
                    "fvu": near(fvu, width),
                    "explained_variance_legacy": 1 - fvu - 0.01,
                    "explained_variance_dictionary_learning": 1 - fvu,
                    "explained_variance_saebench": 1 - fvu + 0.01,
                    "mse": 12.5 * fvu,
                    "cosine": 0.95,
                    "norm_ratio": 0.93,
                    "relative_bias": 0.99,
                    "l0": 16.0,
                    "dead": 0.0,
                    "dense": 0.004,
                    "ce": near(2.9, 0.02),
                    "delta_ce": near(0.2 * fvu, width / 2),
                    "delta_ce_percent": near(7.4 * fvu, width * 10),
                    "ce_score": near(1 - 0.2 * fvu, 0.002),
                    "ce_score_mean": near(1 - 0.3 * fvu, 0.002),
                    "kl": near(0.15 * fvu, 0.002),
                    "kl_score": near(0.97, 0.002),
                }
            )
    _json(
        folder / "evaluation" / "evaluation.json",
        {
            "format": 1,
            "groupsae": "0.1.0",
            "run": str(folder),
            "model": "tiny",
            "revision": None,
            "num_layers": LAYERS,
            "d_model": D_MODEL,
            "last_layer": "own",
            "theta": 0.2,
            "sequences": 128,
            "documents": 30,
            "context": 256,
            "tokens": 32768,
            "predictions": 32640,
            "exclude_special_tokens": False,
            "bootstrap": {"resamples": 1000, "level": 0.95, "seed": 0},
            "ce": near(2.7, 0.02),
            "layers": [
                {"layer": x, "rms_norm": 1.0 + x, "ce_zero": near(9.0), "ce_mean": near(6.0)}
                for x in range(LAYERS)
            ],
            "saes": latents,
            "results": results,
            "groupings": groupings,
            "comparisons": _comparisons(groupings, width),
            "similarity": [
                {
                    "sae": _name(group),
                    "baseline": _name([x]),
                    "layer": x,
                    "mmcs": 0.4 + 0.02 * x,
                    "mmco": 0.2 + 0.01 * x,
                }
                for group in parts["complete"][CHOSEN - 1].groups
                for x in group
                if every and len(group) > 1
            ],
            "cost": {"planned_flops": 2e12, "measured_flops": 2.1e12, "seconds": 74.0},
        },
    )


def _comparisons(groupings: list[dict[str, Any]], width: float) -> list[dict[str, Any]]:
    """Return every grouping against even spacing and smaller SAEs, as many groups."""
    rows = []
    for own in groupings:
        for other in groupings:
            rival = other["kind"] == "smaller" or "even" in other["rules"]
            alike = own["kind"] == "groups" and own["num_groups"] == other["num_groups"]
            if rival and alike and own is not other:
                a, b = own["grouped_layers"], other["grouped_layers"]
                gaps = {key: a[key]["value"] - b[key]["value"] for key in METRICS}
                row = {"grouping": own["name"], "baseline": other["name"]}
                rows.append(row | {key: near(gap, width) for key, gap in gaps.items()})
    return rows


def _grouping(
    name: str,
    kind: str,
    rules: list[str],
    num_groups: int,
    part: Any,
    fvu: float,
    width: float,
    sae_of_layer: dict[int, str],
) -> dict[str, Any]:
    means = {
        "fvu": near(fvu, width),
        "delta_ce": near(0.2 * fvu, width),
        "delta_ce_percent": near(7.4 * fvu, width * 20),
        "ce_score": near(0.98, 0.001),
        "kl": near(0.15 * fvu, 0.001),
        "l0": 16.0,
    }
    return {
        "name": name,
        "kind": kind,
        "rules": rules,
        "chosen_by": [],
        "num_groups": num_groups,
        "groups": part.groups if part else [[x] for x in range(LAYERS - 1)],
        "amad": part.amad if part else None,
        "size_weighted_amad": part.size_weighted_amad if part else None,
        "max_diameter": part.max_diameter if part else None,
        "variance": part.variance if part else None,
        "saes": list(dict.fromkeys(sae_of_layer.values())),
        "sae_of_layer": {str(x): s for x, s in sae_of_layer.items()},
        "cost": {
            "paper": 0.3 + 0.7 * num_groups / 11,
            "flops": 0.5 + 0.5 * num_groups / 11,
            "seconds": 0.55 + 0.45 * num_groups / 11,
        },
        "all_layers": means,
        "grouped_layers": means,
        "spliced_together": None,
    }


def _fired(rng: np.random.Generator, layers: int) -> np.ndarray:
    centre, spread = rng.uniform(-0.5, layers - 0.5, D_SAE), rng.gamma(1.5, 0.7, D_SAE) + 0.15
    shape = np.exp(-(((np.arange(layers)[:, None] - centre) / spread) ** 2))
    total = 32768 * 10 ** rng.normal(-2.2, 0.6, D_SAE)
    fired = np.round(total * shape).astype(np.int64)
    fired[:, :3] = 0
    return fired


def _name(group: list[int]) -> str:
    return f"layers.{group[0]}" + (f"-{group[-1]}" if len(group) > 1 else "")


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change the values of a run's evaluation.json in place."""
    path = folder / "evaluation" / "evaluation.json"
    values = json.loads(path.read_text())
    edit(values)
    _json(path, values)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
