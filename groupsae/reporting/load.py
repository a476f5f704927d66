"""Reads a run folder for the report: plain files, nothing of the training stack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]

from groupsae.files.reading import damaged, read_json, read_metrics, read_npz, read_yaml
from groupsae.grouping.partition import Cosines, Distances
from groupsae.grouping.shares import Shares, advice
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.suite.groups_file import load_plan

FORMAT = 1  # of evaluation.json
_EXAMPLE = "such as outputs/tiny/amad-0.2/<...>"
Values = Mapping[str, Any]


def interval(stored: Any) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high of an interval, a number or null of `evaluation.json`."""
    if isinstance(stored, Mapping):
        return stored.get("value"), stored.get("low"), stored.get("high")
    return stored, None, None


def value_of(stored: Any) -> float | None:
    """Return the value that `interval` reads, without its ends."""
    return interval(stored)[0]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run folder; parts that do not exist yet are empty."""

    folder: Path = Path()
    config: Values = field(default_factory=dict)  # its interpolations are unresolved
    config_text: str = ""
    overrides: Sequence[str] = ()  # arguments of the command that started the run
    plan: Values = field(default_factory=dict)  # of `groups.json`
    measured: Values = field(default_factory=dict)  # provenance of the distances
    distances: Distances | None = None  # fractions of pi, [L, L]
    other_distances: Distances | None = None  # with the other centring
    cosines: Cosines | None = None  # means, [L, L]
    other_cosines: Cosines | None = None
    shares: Shares | None = None  # what the layers' squared norms consist of
    other: Values = field(default_factory=dict)  # the groups that the other centring gives
    metrics: Sequence[tuple[int, str, float]] = ()  # step, metric, value
    summary: Values = field(default_factory=dict)  # empty while the run is unfinished
    evaluation: Values = field(default_factory=dict)
    downstream: Mapping[str, Values] = field(default_factory=dict)  # other parts of it, by name
    ledger: Values = field(default_factory=dict)
    explained: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # of `interpretation/`

    def setting(self, key: str) -> Any:
        """Return a value of the configuration by its dotted key; None if it is missing."""
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    @property
    def name(self) -> str:
        """The last parts of the folder: model, grouping, and the run's own name."""
        return "/".join(self.folder.parts[-3:])

    @property
    def model(self) -> str:
        """The language model's name."""
        return str(self.setting("model.name") or self.measured.get("model", self.name))

    @property
    def imported(self) -> str | None:
        """The origin of imported SAEs; None if the run trained its own."""
        return self.summary.get("adopted")

    @property
    def seed(self) -> int | None:
        """The seed of the training."""
        return None if self.imported else self.setting("seed")

    @property
    def amad(self) -> float | None:
        """AMAD of the groups, fractions of pi; None if nobody measured the angles."""
        return None if self.imported else self.plan.get("amad")

    @property
    def theta(self) -> float | None:
        """The threshold on AMAD, if the groups were chosen by one."""
        theta = self.evaluation.get("theta", self.setting("groups.theta"))
        return float(theta) if isinstance(theta, int | float) else None

    @property
    def groups(self) -> list[list[int]]:
        """The groups of layers, without a last layer that has its own SAE."""
        return [list(group) for group in self.plan.get("groups", [])]

    @property
    def advice(self) -> str | None:
        """What dominates the activations, and the command to use instead; None if nothing does."""
        if self.shares is None:
            return None
        return advice(
            self.shares,
            centring=self.measured["centring"],
            filtered=self.measured.get("max_norm_ratio") is not None,
            groups=(self.groups, self.other["groups"]) if self.other else None,
            overrides=self.overrides,
        )

    @property
    def saes(self) -> dict[str, list[int]]:
        """Name -> layers of the SAEs of the chosen grouping."""
        return dict(zip(self.plan.get("names", []), self.plan.get("saes", []), strict=True))

    @property
    def groupings(self) -> list[dict[str, Any]]:
        """The evaluated groupings."""
        return self.evaluation.get("groupings", [])

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The grouping of the run, the first of an evaluation; None before the first."""
        return self.groupings[0] if self.groupings else None

    @property
    def grouped_layers(self) -> Values:
        """The chosen grouping's means over the grouped layers."""
        return (self.chosen or {}).get("grouped_layers") or {}

    @property
    def saving(self) -> float | None:
        """The share of FLOPs that the chosen grouping saves against one SAE per layer."""
        cost = ((self.chosen or {}).get("cost") or {}).get("flops")
        if cost is not None:
            return 1 - cost
        stored = self.ledger.get("saving", {}).get("flops")
        return (self.summary.get("cost") or {}).get("saving") if stored is None else stored

    @property
    def per_layer(self) -> dict[str, Any] | None:
        """The grouping with one full-width SAE per layer, if it was trained."""
        return next((g for g in self.groupings if g["kind"] == "per_layer"), None)

    @cached_property
    def _results(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {(r["sae"], int(r["layer"])): r for r in self.evaluation.get("results", [])}

    def layer_results(self, grouping: Values | None) -> dict[int, dict[str, Any]]:
        """Return layer -> the figures of the SAE that a grouping gives the layer, ascending."""
        owners = sorted(
            (int(x), sae) for x, sae in (grouping or {}).get("sae_of_layer", {}).items()
        )
        return {x: self._results[sae, x] for x, sae in owners if (sae, x) in self._results}

    @property
    def similarity(self) -> dict[int, dict[str, Any]]:
        """Layer -> MMCS and MMCO of its own SAE against that of its group; shared SAEs only."""
        owners = (self.chosen or {}).get("sae_of_layer", {})
        rows = self.evaluation.get("similarity") or []
        found = {
            int(row["layer"]): row
            for row in rows
            if owners.get(str(row["layer"])) == row["sae"] != row["baseline"]
        }
        return dict(sorted(found.items()))

    def latents(self, sae: str) -> dict[str, np.ndarray] | None:
        """Return fired [layer, d_sae], layers and tokens of one SAE, if they were saved."""
        path = self.folder / "evaluation" / "latents" / f"{sae}.npz"
        return read_npz(path) if path.exists() else None


def read_run(folder: Path) -> RunFiles:
    """Return the files of a run folder; those that come later in a run's life may be missing.

    Raises:
        UserError: it is no run folder, or one of its files is damaged or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"run={folder}: there is no such folder. Name a run folder, {_EXAMPLE}.")
    if not (folder / "groups.json").exists():
        inside = sorted(folder.glob("**/groups.json"))
        hint = f"Did you mean {inside[0].parent}?" if inside else f"Name one {_EXAMPLE}."
        raise UserError(f"run={folder}: no run there (no groups.json). {hint}")
    plan = load_plan(folder)  # refuses groups that were changed by hand
    assert plan is not None
    parts = {}
    for file in sorted((folder / "evaluation").glob("*.json")):
        parts[file.stem] = found = read_json(file) or {}
        if found.get("format") != FORMAT:
            raise UserError(
                f"{file} has format {found.get('format')}; this version reads {FORMAT}. "
                f"Evaluate the run again: {command('evaluate', run=folder)}"
            )
    config, groups = folder / ".hydra" / "config.yaml", read_json(folder / "groups.json") or {}
    path = folder / "angles.npz"
    angles = read_npz(path) if path.exists() else {}
    return RunFiles(
        folder=folder,
        config=read_yaml(config) or {},
        config_text=config.read_text(encoding="utf-8") if config.exists() else "",
        overrides=[str(value) for value in read_yaml(config.with_name("overrides.yaml")) or []],
        plan=plan.to_json(),
        measured=groups.get("measured", {}),
        distances=angles.get("distances"),
        other_distances=angles.get("other_distances"),
        cosines=angles.get("cosines"),
        other_cosines=angles.get("other_cosines"),
        shares=Shares.read(angles),
        other=groups.get("other") or {},
        metrics=read_metrics(folder / "metrics.csv"),
        summary=read_json(folder / "summary.json") or {},
        evaluation=parts.get("evaluation", {}),
        downstream={part: found for part, found in parts.items() if part != "evaluation"},
        ledger=read_json(folder / "ledger.json") or {},
        explained=read_explained(folder),
    )


def read_explained(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a run's interpretation by name; empty if it was not interpreted.

    Raises:
        UserError: one is damaged.
    """
    found = {}
    for name in ("groupings", "latents", "transfer"):
        file = folder / "interpretation" / f"{name}.csv"
        if not file.exists():
            return {}
        try:  # (a latent may be explained by the token NA)
            found[name] = pd.read_csv(file, keep_default_na=False, na_values=[""])
        except (ValueError, OSError) as error:
            raise damaged(file, error) from error
    return found
