"""What a run folder holds, read for the report: plain files, nothing of the training stack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np

from groupsae.files.reading import read_json, read_metrics, read_npz, read_yaml
from groupsae.grouping.partition import Distances
from groupsae.runtime.errors import UserError
from groupsae.suite.groups_file import load_plan

FORMAT = 1  # of evaluation.json


class Interval(NamedTuple):
    """A value with its confidence interval; low and high are None where there is none."""

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """Return -1 or 1 where the whole interval lies on one side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    @property
    def bounds(self) -> tuple[float, float]:
        """Return (low, high), both the value where there is no interval."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high


def interval(stored: Any) -> Interval | None:
    """Return what `evaluation.json` stores as an interval or as a bare number; None for null."""
    if stored is None:
        return None
    if isinstance(stored, Mapping):
        if stored.get("value") is None:
            return None
        return Interval(stored["value"], stored.get("low"), stored.get("high"))
    return Interval(float(stored), None, None)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run folder.

    Args:
        folder: where it is.
        config: what `.hydra/config.yaml` says, interpolations as they stand there.
        config_text: the file itself.
        overrides: the arguments of the command that started the run.
        plan: of `groups.json`.
        measured: provenance of the distances.
        distances: fractions of pi, [L, L]; None if `angles.npz` is missing.
        metrics: (step, metric, value) of `metrics.csv`.
        summary: `summary.json`; None while the run is unfinished.
        evaluation: `evaluation/evaluation.json`; None before it was evaluated.
        ledger: `ledger.json`, if there is one.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    overrides: list[str]
    plan: dict[str, Any]
    measured: dict[str, Any]
    distances: Distances | None
    metrics: list[tuple[int, str, float]]
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    ledger: dict[str, Any] | None

    @property
    def name(self) -> str:
        """Return the last parts of the folder: model, grouping, and the run's own name."""
        return "/".join(self.folder.parts[-3:])

    @property
    def model(self) -> str:
        """Return the language model's name."""
        found = self.setting("model.name", self.measured.get("model", self.folder.parts[-3:][0]))
        return str(found)

    @property
    def seed(self) -> int | None:
        """Return the seed of the run."""
        seed = self.setting("seed", None)
        return int(seed) if seed is not None else None

    @property
    def adopted(self) -> str | None:
        """Return where SAEs that others trained were found; None if the run trained its own."""
        return (self.summary or {}).get("adopted")

    @property
    def kinds(self) -> str:
        """Return the kinds of SAE that the report is about; empty before an evaluation."""
        found = (sae.get("architecture") for sae in (self.evaluation or {}).get("saes", []))
        return ", ".join(sorted({str(kind) for kind in found if kind}))

    @property
    def l0(self) -> float | None:
        """Return the mean L0 over the layers of the grouping that the report is about."""
        rows = (self.evaluation or {}).get("results", [])
        mine = (self.summary or {}).get("chosen") or [row["sae"] for row in rows]
        found = [v.value for r in rows if r["sae"] in mine and (v := interval(r.get("l0")))]
        return sum(found) / len(found) if found else None

    @property
    def theta(self) -> float | None:
        """Return the threshold on AMAD, if the groups were chosen by one."""
        theta = (self.evaluation or {}).get("theta", self.setting("groups.theta", None))
        return float(theta) if isinstance(theta, int | float) else None

    def setting(self, key: str, default: Any) -> Any:
        """Return a value of the configuration by its dotted key."""
        found: Any = self.config
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    @cached_property
    def groupings(self) -> list[dict[str, Any]]:
        """Return the evaluated groupings; none before the run was evaluated."""
        return list((self.evaluation or {}).get("groupings", []))

    @cached_property
    def chosen(self) -> dict[str, Any] | None:
        """Return the grouping the report is about; None before the run was evaluated."""
        return chosen_grouping(self.groupings)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Return the groups the report is about, without a last layer of its own."""
        if self.chosen is not None and self.chosen["kind"] != "smaller":
            return [list(group) for group in self.chosen["groups"]]
        return [list(group) for group in self.plan.get("groups", [])]

    @cached_property
    def saes(self) -> dict[str, list[int]]:
        """Return name -> layers of the SAEs the report is about."""
        if self.chosen is not None and self.evaluation is not None:
            layers = {s["name"]: list(s["layers"]) for s in self.evaluation["saes"]}
            return {name: layers[name] for name in self.chosen["saes"] if name in layers}
        names = self.plan.get("names", [])
        return dict(zip(names, self.plan.get("saes", []), strict=False))

    @cached_property
    def per_layer(self) -> dict[str, Any] | None:
        """Return the grouping with one full-width SAE per layer, if it was trained."""
        return next((g for g in self.groupings if g["kind"] == "per_layer"), None)

    def baseline(self, kind: str) -> dict[str, Any] | None:
        """Return the `even` or `smaller` baseline of the chosen grouping's cost, if trained."""
        if self.chosen is None or self.chosen["kind"] != "groups":
            return None
        for grouping in self.groupings:
            of_kind = (
                grouping["kind"] == "smaller"
                if kind == "smaller"
                else grouping["kind"] == "groups" and "even" in (grouping.get("rules") or [])
            )
            if of_kind and grouping["num_groups"] == self.chosen["num_groups"]:
                return grouping
        return None

    def result(self, sae: str, layer: int) -> dict[str, Any] | None:
        """Return the figures of one SAE at one layer."""
        return self._results.get((sae, layer))

    @cached_property
    def _results(self) -> dict[tuple[str, int], dict[str, Any]]:
        results = (self.evaluation or {}).get("results", [])
        return {(r["sae"], int(r["layer"])): r for r in results}

    def latents(self, sae: str) -> dict[str, np.ndarray] | None:
        """Return fired [layer, d_sae], layers and tokens of one SAE, if they were saved."""
        path = self.folder / "evaluation" / "latents" / f"{sae}.npz"
        return read_npz(path) if path.exists() else None


def chosen_grouping(groupings: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the grouping that sums a run up, which an evaluation puts first."""
    return groupings[0] if groupings else None


def read_run(folder: Path) -> RunFiles:
    """Return what a run folder holds; what comes later in a run's life may be missing.

    Raises:
        UserError: it is no run folder, or one of its files is damaged or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"run={folder}: there is no such folder. Name a run folder, {_EXAMPLE}.")
    if not (folder / "groups.json").exists():
        inside = sorted(folder.glob("**/groups.json"))
        hint = f"Did you mean {inside[0].parent}?" if inside else f"Name one {_EXAMPLE}."
        raise UserError(f"run={folder}: no run there (no groups.json). {hint}")
    load_plan(folder)  # refuses what was changed by hand, as evaluating does
    groups = read_json(folder / "groups.json") or {}
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    if evaluation is not None and evaluation.get("format") != FORMAT:
        raise UserError(
            f"{folder / 'evaluation' / 'evaluation.json'} has format {evaluation.get('format')}; "
            f"this version reads {FORMAT}. Evaluate the run again: "
            f"python -m groupsae.evaluate {quote(f'run={folder}')}"
        )
    config_file, angles = folder / ".hydra" / "config.yaml", folder / "angles.npz"
    text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    overrides = folder / ".hydra" / "overrides.yaml"
    return RunFiles(
        folder=folder,
        config=read_yaml(config_file) or {},
        config_text=text,
        overrides=[str(value) for value in read_yaml(overrides) or []],
        plan=groups.get("plan", {}),
        measured=groups.get("measured", {}),
        distances=read_npz(angles)["distances"].astype(np.float64) if angles.exists() else None,
        metrics=read_metrics(folder / "metrics.csv"),
        summary=read_json(folder / "summary.json"),
        evaluation=evaluation,
        ledger=read_json(folder / "ledger.json"),
    )


_EXAMPLE = "such as outputs/tiny/amad-0.2/<...>"
