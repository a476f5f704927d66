"""The tables of docs/predicting-loss.md: `python -m benchmarks.law <run folder> <run folder> ...`.

Which figure of the layers, known before training, predicts the FVU that sharing an SAE loses? The
arguments are finished runs of `groups=all`, of one or more models and seeds; the published
figures of the paper (`published.json`) count as further models. Writes the part between the two
marks in docs/predicting-loss.md, and its figure. `size=smallest` trains a small run itself, for
CI, and only prints; `tokens=` is the number of calibration tokens that are compared.

A row is a layer in a group, a group (the mean of its layers) or a partition (the mean of all
grouped layers). Its loss is the FVU of the group's SAE minus that of the layer's own. A law is a
sum of one or two figures with weights of at least 0, and no constant: one SAE per layer loses 0.
"FVU × figure" is the figure of each layer times the FVU of its own SAE: the loss is then a share
of that FVU.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import torch
from matplotlib.figure import Figure
from scipy.optimize import nnls

from benchmarks.replication import table, write_figures
from benchmarks.timing import SMALLEST_RUN, smallest
from groupsae.app.run_folder import finished_run
from groupsae.app.stream import make_stream
from groupsae.config.instantiate import make
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.groupings import groupings
from groupsae.grouping.partition import LOSS_PER_VARIANCE, angular_variance
from groupsae.reporting.formatting import span
from groupsae.reporting.load import read_run, value_of
from groupsae.reporting.style import COLOURS
from groupsae.suite.groups_file import load_plan

HERE = Path(__file__).parent
DOC = HERE.parent / "docs" / "predicting-loss.md"
BEGIN = "<!-- figures: python -m benchmarks.law -->"
GOLDEN = HERE.parent / "tests" / "helpers" / "golden" / "pythia_1b.json"
TOKENS = 16_384  # compared between layers; half of them fit the linear maps, half test them
RIDGE = 1e-3  # of the mean eigenvalue
LEVELS = ("layer", "group", "partition")
MOST_LAYERS = 18  # of which all partitions are formed
BEST = "V as grouped"  # LOSS_PER_VARIANCE times this is what the models share
FEW = 5  # partitions, among which laws are not compared
Group = tuple[int, ...]
Square = np.ndarray

# figure -> what it is; the mean over a group's or a partition's layers, but for OF_PARTITIONS
FIGURES = {
    "V": "angular variance of the group, uncentred",
    "V centred": "the same of centred activations",
    "V as grouped": "that of the two which the run grouped by (calibration.centring)",
    "own": "the layer's own mean (1 - cosine) / 2 to its group",
    "own centred": "the same of centred activations",
    "1 - R²": "mean share of the layer's variance that no linear map from its group gives",
    "D": "largest angle in the group; of a partition the size-weighted AMAD",
    "S": "log of the number of layers in the group",
    "share": "-log of the layer's mean cosine to its group",
    "AMAD": "mean largest angle of the groups, each counted once",
    "largest D": "largest angle of all groups",
    "log n/G": "log of layers per group",
}
TIMES, MEAN = "FVU × ", "mean FVU × "  # of the layer's own SAE; of the means over a partition
OF_LAYERS = [name for name in FIGURES if name not in ("AMAD", "largest D", "log n/G")]
RELATIVE = ("V", "V centred", "V as grouped", "D", "AMAD", "log n/G")
OF_PARTITIONS = ("AMAD", "largest D", "log n/G", *(MEAN + name for name in RELATIVE))
ALONE = [*FIGURES, *(TIMES + name for name in OF_LAYERS), *(MEAN + name for name in RELATIVE)]
WITH_SIZE = [
    (times + name, times + "S")
    for times in ("", TIMES)
    for name in ("V", "V centred", "own", "1 - R²", "D", "share")
]
LAWS = [*((name,) for name in ALONE), *WITH_SIZE]


class Model(NamedTuple):
    """What one run, or a published model, measured.

    Attributes:
        name: of the language model.
        seed: of the run.
        tokens: that each SAE was trained on; 0 where that does not matter.
        layers: matrices between its grouped layers [n, n], NaN where unknown: `angle`, `cosine`,
            `centred` (cosines), `grouped` (one of them), `linear` (R² of column from row).
        own: FVU of each grouped layer's own SAE; NaN where unknown.
        lost: group -> FVU lost by each of its layers.
        partitions: rules -> groups.
    """

    name: str
    seed: int
    tokens: int
    layers: Mapping[str, Square]
    own: np.ndarray
    lost: Mapping[Group, np.ndarray]
    partitions: Mapping[str, Sequence[Group]]


# ---- what was measured -------------------------------------------------------------------------


def read_model(folder: Path, layers: Mapping[str, Square]) -> Model:
    """Return what a finished run of groups=all measured; without an evaluation, when it ended."""
    run, plan = read_run(folder), load_plan(folder)
    assert plan is not None
    fvu = {
        (r["sae"], int(r["layer"])): value_of(r["fvu"]) for r in run.evaluation.get("results", [])
    }
    for name, sae in run.summary["groups"].items() if not fvu else ():
        fvu |= {(name, int(layer)): value for layer, value in sae["fvu_per_layer"].items()}
    found = groupings(plan)
    single = next((each for each in found if each.kind == "per_layer"), None)
    if single is None or run.seed is None:
        sys.exit(f"{folder} has no SAE for each layer: train it with groups=all")
    own = np.array([fvu[single.sae_of_layer[x], x] for x in single.grouped])
    lost, partitions = dict[Group, np.ndarray](), dict[str, Sequence[Group]]()
    for each in (each for each in found if each.kind == "groups" and each.partition):
        groups = [tuple(group) for group in each.partition.groups]
        partitions[", ".join(each.rules) + f" {len(groups)}"] = groups
        for group in groups:
            mine = np.array([fvu[each.sae_of_layer[x], x] for x in group])
            lost[group] = mine - own[list(group)]
    n = len(own)
    assert run.distances is not None
    grouped = layers["cosine" if run.measured["centring"] == "none" else "centred"]
    more = {"angle": run.distances, "grouped": grouped}
    kept = {name: x[:n, :n] for name, x in {**layers, **more}.items()}
    tokens = finished_run(folder, trusted=False).tokens
    return Model(Path(run.model).name, run.seed, tokens, kept, own, lost, partitions)


def compare_layers(folder: Path, tokens: int) -> dict[str, Square]:
    """Return the matrices between all layers of a run's model, from its calibration text."""
    cfg = finished_run(folder, trusted=False)
    data = make_stream(cfg, make(cfg.model), print)
    parts, held = list[torch.Tensor](), 0
    for batch in data.calibration_batches(tokens):
        keep = batch.everywhere()
        parts.append((batch.acts if keep is None else batch.acts[:, keep]).float())
        held += parts[-1].shape[1]
        if held >= tokens:
            break
    acts = torch.cat(parts, dim=1)
    found = {}
    for name, centring in (("cosine", "none"), ("centred", "mean")):
        angles = AngularDistance(num_layers=len(acts), centring=centring)
        if centring == "mean":
            angles.set_mean(acts.double().mean(dim=1))
        angles.update(acts)
        found[name] = angles.cosines().numpy()
    return {**found, "linear": linear(acts)}


def linear(acts: torch.Tensor) -> Square:
    """Return R² [from, to] of the best linear map between two layers, on the odd tokens.

    Ridge regression on the even ones: x_to is predicted by (x_from - mean) W + mean.
    """
    fitted, tested = acts[:, ::2], acts[:, 1::2]
    means = fitted.mean(dim=1, keepdim=True)
    fitted, tested = fitted - means, tested - means
    explained = np.eye(len(acts))
    for i, x in enumerate(fitted):
        gram = (x.T @ x).double()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
        factor = torch.linalg.cholesky(gram)
        for j, y in enumerate(fitted):
            if i != j:
                maps = torch.cholesky_solve((x.T @ y).double(), factor).float()
                error = (tested[j] - tested[i] @ maps).square().sum()
                explained[i, j] = 1 - float(error / tested[j].square().sum())
    return explained


def published() -> list[Model]:
    """Return the published models whose groups are known, as far as their figures allow.

    Their distances were measured on centred activations, so they are given as both kinds. Of
    Pythia-160M no matrix is at hand, but its ten AMADs are ten equations for the largest
    angles of its ten groups, which are the angles between their ends.
    """
    stored, golden = (json.loads(path.read_text()) for path in (HERE / "published.json", GOLDEN))
    lower = golden["distances_lower"][:15]
    angle = np.array([row + [0.0] * (15 - len(row)) for row in lower])
    angle = angle + angle.T
    of_1b = stored["pythia-1b"]
    partitions = {
        f"published {len(each['groups'])}": [tuple(group) for group in each["groups"]]
        for each in golden["published"][: len(of_1b["fvu"])]
    }
    layers = _published_layers(angle)
    own = np.full(15, of_1b["per_layer"])  # the mean over layers
    one_b = Model("pythia-1b", 0, 0, layers, own, {}, partitions)

    small, n = stored["pythia-160m"], len(stored["pythia-160m"]["per_layer"])
    own = np.array(small["per_layer"])
    partitions, lost = {}, dict[Group, np.ndarray]()
    for each in small["partitions"]:
        groups = [tuple(group) for group in each["groups"]]
        partitions[f"published {len(groups)}"] = groups
        lost |= {g: np.array(each["fvu"])[list(g)] - own[list(g)] for g in groups if len(g) > 1}
    counts = [[float(group in groups) for group in lost] for groups in partitions.values()]
    sums = [len(each["groups"]) * each["amad"] for each in small["partitions"]]
    angle = np.where(np.eye(n) > 0, 0.0, np.nan)
    for group, at in zip(lost, np.linalg.solve(counts, sums), strict=True):
        angle[group[0], group[-1]] = angle[group[-1], group[0]] = at
    return [one_b, Model("pythia-160m", 0, 0, _published_layers(angle), own, lost, partitions)]


def _published_layers(angle: Square) -> dict[str, Square]:
    cosine = np.cos(np.pi * angle)
    unknown = np.full_like(angle, np.nan)
    alike = dict.fromkeys(("cosine", "centred", "grouped"), cosine)
    return {"angle": angle, "linear": unknown, **alike}


def published_means() -> pd.DataFrame:
    """Return rows of the published partitions of which only means over layers are at hand.

    The losses of Pythia-1B, and all that is known of Pythia-410M.
    """
    stored = json.loads((HERE / "published.json").read_text())
    rows = []
    for name in ("pythia-1b", "pythia-410m"):
        of = stored[name]
        for i, fvu in enumerate(of["fvu"]):
            row: dict[str, Any] = {"model": name, "seed": 0, "name": f"published {i + 1}"}
            row |= {"G": i + 1, "lost": fvu - of["per_layer"], "per_layer": of["per_layer"]}
            if "amad" in of:
                row |= {"AMAD": of["amad"][i], "log n/G": float(np.log(of["layers"] / (i + 1)))}
            rows.append(row)
    return pd.DataFrame(rows)


# ---- figures of layers, groups and partitions --------------------------------------------------


def figures(layers: Mapping[str, Square], group: Group) -> dict[str, np.ndarray]:
    """Return the figures of a group's layers, each [layer]."""
    inside = {name: square[np.ix_(group, group)] for name, square in layers.items()}
    cosine, centred, r2 = inside["cosine"], inside["centred"], inside["linear"].mean(axis=0)
    every = np.ones(len(group))
    with np.errstate(invalid="ignore"):
        return {
            "V": angular_variance(layers["cosine"], group) * every,
            "V centred": angular_variance(layers["centred"], group) * every,
            "V as grouped": angular_variance(layers["grouped"], group) * every,
            "own": (1 - cosine.mean(axis=0)) / 2,
            "own centred": (1 - centred.mean(axis=0)) / 2,
            "1 - R²": 1 - r2,
            "D": np.nanmax(inside["angle"]) * every,
            "S": np.log(len(group)) * every,
            "share": -np.log(np.maximum(cosine.mean(axis=0), 1e-3)),
        }


def rows_of_group(model: Model, group: Group) -> pd.DataFrame:
    """Return the figures of a group's layers, also times the FVU of the layer's own SAE."""
    frame = pd.DataFrame(figures(model.layers, group))
    own = model.own[list(group)]
    return frame.join(frame.mul(own, axis=0).add_prefix(TIMES)).assign(per_layer=own, layer=group)


def rows_of(model: Model) -> dict[str, pd.DataFrame]:
    """Return the rows of each level."""
    at = {"model": model.name, "seed": model.seed}
    groups = set(model.lost) | {g for part in model.partitions.values() for g in part}
    found = {group: rows_of_group(model, group) for group in groups}
    for group, frame in found.items():
        zero = np.zeros(1) if len(group) == 1 else np.full(len(group), np.nan)
        frame["lost"] = model.lost.get(group, zero)
    layers = [frame.assign(name=span(g), **at) for g, frame in found.items() if len(g) > 1]
    partitions = []
    for name, part in model.partitions.items():
        mean = pd.concat([found[group] for group in part]).mean(skipna=False)
        n, angle = sum(map(len, part)), model.layers["angle"]
        largest = [float(np.nanmax(angle[np.ix_(group, group)])) for group in part]
        more = {
            "AMAD": np.mean(largest),
            "largest D": max(largest),
            "log n/G": np.log(n / len(part)),
        }
        partitions.append({**mean, **more, "G": len(part), "name": name, **at})
    every = pd.concat(layers)
    by_group = every.groupby(["model", "seed", "name"], as_index=False).mean()
    return {"layer": every, "group": by_group, "partition": pd.DataFrame(partitions)}


def all_rows(models: Sequence[Model]) -> dict[str, pd.DataFrame]:
    """Return the rows of all models, by level; those with a known loss."""
    found = [rows_of(model) for model in models]
    rows = {level: pd.concat([each[level] for each in found]) for level in LEVELS}
    keys, means = ["model", "seed", "name", "G"], published_means()
    merged = rows["partition"].merge(means, "outer", keys, suffixes=("", "_mean"))
    for name in ("lost", "per_layer", "AMAD", "log n/G"):
        merged[name] = merged[name].fillna(merged.pop(f"{name}_mean"))
    for name in RELATIVE:
        merged[MEAN + name] = merged["per_layer"] * merged[name]
    rows["partition"] = merged
    return {level: frame[frame["lost"].notna()] for level, frame in rows.items()}


# ---- laws --------------------------------------------------------------------------------------


class Law(NamedTuple):
    """Weights of the figures."""

    figures: Sequence[str]
    weights: np.ndarray

    def __call__(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the predicted losses of rows."""
        return np.asarray(frame[list(self.figures)].to_numpy(float) @ self.weights)


def fit(frame: pd.DataFrame, law: Sequence[str]) -> Law:
    """Return the least squares fit; every model counts alike, however many rows it has."""
    counts = frame.groupby("model")["lost"].transform("size").to_numpy(float)
    scale = frame.groupby("model")["lost"].transform(lambda x: np.sqrt(np.mean(x**2))).to_numpy()
    weight = 1 / (np.sqrt(counts) * scale)
    x, y = frame[list(law)].to_numpy(float), frame["lost"].to_numpy(float)
    return Law(law, nnls(x * weight[:, None], y * weight)[0])


def known(frame: pd.DataFrame, law: Sequence[str]) -> pd.DataFrame:
    """Return the rows that have all figures of a law."""
    missing = [name for name in law if name not in frame]
    return frame.iloc[:0] if missing else frame[frame[list(law)].notna().all(axis=1)]


def error(law: Law, frame: pd.DataFrame) -> float:
    """Return the root mean square error over that of the loss: 0 is exact, 1 says no loss."""
    lost = frame["lost"].to_numpy(float)
    return float(np.sqrt(np.mean((law(frame) - lost) ** 2) / np.mean(lost**2)))


def r_squared(law: Law, frame: pd.DataFrame) -> float:
    """Return the share of the variance of the losses that a law gives."""
    lost = frame["lost"].to_numpy(float)
    return 1 - float(np.sum((law(frame) - lost) ** 2) / np.sum((lost - lost.mean()) ** 2))


def kendall(predicted: np.ndarray, lost: np.ndarray, counts: np.ndarray) -> float:
    """Return Kendall's tau over the pairs of partitions with equal G: which of two is better."""
    agree = total = 0.0
    for count in np.unique(counts):
        at = counts == count
        one, two = (np.sign(np.subtract.outer(v[at], v[at])) for v in (predicted, lost))
        agree += float((one * two).sum())
        total += float((two != 0).sum())
    return agree / total if total else float("nan")


class Formed(NamedTuple):
    """All partitions that the trained groups of a run can form.

    Attributes:
        uses: which groups each one has, [partition, group].
        counts: G of each, [partition].
    """

    uses: np.ndarray
    counts: np.ndarray

    def mean(self, per_group: np.ndarray) -> np.ndarray:
        """Return the mean over layers, from the sum over each group's layers."""
        return np.asarray(self.uses @ per_group)


def formed(groups: Sequence[Group], num_layers: int) -> Formed:
    """Return the partitions of more than one and fewer than n groups that these can form."""

    def runs(first: int) -> Iterator[list[int]]:
        if first == num_layers:
            yield []
        for i, group in enumerate(groups):
            if group[0] == first:
                yield from ([i, *rest] for rest in runs(group[-1] + 1))

    found = [part for part in runs(0) if 1 < len(part) < num_layers]
    uses = np.zeros((len(found), len(groups)))
    for row, part in enumerate(found):
        uses[row, part] = 1 / num_layers
    return Formed(uses, np.array([len(part) for part in found]))


class Study:
    """The models of a study, and the tables over them.

    Of a model with runs of several lengths the longest ones count; the others are in `by_length`.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        most = {each.name: 0 for each in models}
        for each in models:
            most[each.name] = max(most[each.name], each.tokens)
        self.every = list(models)
        self.models = [each for each in models if each.tokens == most[each.name]]
        self.rows = all_rows([*self.models, *published()])
        self.names = list(dict.fromkeys(self.rows["partition"]["model"]))
        self.trained = list(dict.fromkeys(model.name for model in models))
        self.formed = {name: self._form(name) for name in self.trained}

    def of(self, level: str, law: Sequence[str], model: str) -> pd.DataFrame:
        """Return the rows of a model that a law can predict."""
        frame = known(self.rows[level], law)
        return frame[frame["model"] == model]

    def within(self, model: str) -> list[str]:
        """Return how well each law holds inside of one model: fitted on it, and on other seeds."""
        rows = []
        for law in LAWS:
            cells = [_name(law)]
            for level in LEVELS:
                if level != "partition" and set(law) & set(OF_PARTITIONS):
                    cells += ["–", "–"]
                    continue
                frame = self.of(level, law, model)
                cells += [f"{r_squared(fit(frame, law), frame):.3f}"]
                cells += [_percent(self._other_seeds(frame, law))]
            tau, formed_tau, choice = self._orders(model, law)
            shown = "–" if np.isnan(choice) else f"{choice:.4f}"
            rows.append([*cells, _two(tau), _two(formed_tau), shown])
        heads = [f"{level}, {what}" for level in LEVELS for what in ("R²", "error")]
        return table(["law", *heads, "τ, rules", "τ, all formed", "loss of its choice"], rows)

    def _other_seeds(self, frame: pd.DataFrame, law: Sequence[str]) -> float:
        seeds = list(frame["seed"].unique())
        if len(seeds) < 2:
            return float("nan")
        parts = [(frame[frame["seed"] != s], frame[frame["seed"] == s]) for s in seeds]
        return float(np.mean([error(fit(train, law), test) for train, test in parts]))

    def _orders(self, model: str, law: Sequence[str]) -> tuple[float, float, float]:
        """Return tau over the rules' partitions and over all formed, and the loss of its choice.

        Losses are means over seeds; the choice is the formed partition with the lowest
        prediction, at each G, and its loss the mean over G.
        """
        frame = self.of("partition", law, model)
        fitted = fit(frame, law)
        mean = frame.groupby("name")[["lost", "G", *law]].mean()
        of_rules = kendall(fitted(mean), *mean[["lost", "G"]].to_numpy(float).T)
        if set(law) & set(OF_PARTITIONS) or self.formed[model] is None:
            return of_rules, float("nan"), float("nan")
        groups, parts, lost = self.formed[model]
        runs = [m for m in self.models if m.name == model]
        one = runs[0]._replace(own=np.mean([run.own for run in runs], axis=0))
        sums = [fitted(rows_of_group(one, group)).sum() for group in groups]
        predicted, measured = parts.mean(np.array(sums)), parts.mean(lost)
        chosen = [
            measured[parts.counts == count][predicted[parts.counts == count].argmin()]
            for count in np.unique(parts.counts)
        ]
        return of_rules, kendall(predicted, measured, parts.counts), float(np.mean(chosen))

    def _form(self, model: str, seeds: Sequence[int] | None = None) -> Any:
        """Return the groups, the partitions they form, each group's loss; None for too many."""
        runs = [m for m in self.models if m.name == model and (seeds is None or m.seed in seeds)]
        n = len(runs[0].own)
        if n > MOST_LAYERS:
            return None
        shared = set.intersection(*(set(run.lost) for run in runs))
        groups = sorted({g for g in shared if len(g) > 1} | {(x,) for x in range(n)})
        lost = [
            0.0 if len(g) == 1 else float(np.mean([run.lost[g].sum() for run in runs]))
            for g in groups
        ]
        return groups, formed(groups, n), np.array(lost)

    def ceiling(self, model: str) -> str:
        """Return how well one seed orders partitions as the mean of the other seeds does."""
        seeds = [m.seed for m in self.models if m.name == model]
        frame = self.of("partition", ("S",), model)
        if len(seeds) < 2 or self.formed[model] is None:
            return ""
        rules, every = [], []
        for seed in seeds:
            rest = frame[frame["seed"] != seed].groupby("name")[["lost", "G"]].mean()
            mine = frame[frame["seed"] == seed].set_index("name").loc[rest.index, "lost"]
            one_by_rules = (x.to_numpy(float) for x in (mine, rest["lost"], rest["G"]))
            rules.append(kendall(*one_by_rules))
            one, others = (
                self._form(model, picked)
                for picked in ([seed], [other for other in seeds if other != seed])
            )
            losses = [parts.mean(lost) for _, parts, lost in (one, others)]
            every.append(kendall(losses[0], losses[1], one[1].counts))
        return (
            f"One seed orders partitions of equal G as the mean of the others does with "
            f"τ = {np.mean(rules):.2f} (rules) and {np.mean(every):.2f} (all formed)."
        )

    def choices(self, model: str) -> list[str]:
        """Return the losses, means over G and seeds, of the rules' and of the best partitions."""
        if self.formed[model] is None:
            return []
        _, parts, lost = self.formed[model]
        measured = parts.mean(lost)
        by_count = [measured[parts.counts == count] for count in np.unique(parts.counts)]
        rows = [
            ["best of all formed, in hindsight", _mean(x.min() for x in by_count)],
            ["mean of all formed", _mean(x.mean() for x in by_count)],
        ]
        frame = self.of("partition", ("S",), model)
        for rule in ("complete", "minmax", "even", "published", "variance"):
            of = frame[[rule in name for name in frame["name"]]]
            of = of[of["G"].isin(np.unique(parts.counts))]
            if not of.empty:
                rows.append([rule, _mean(of.groupby("G")["lost"].mean())])
        return [
            f"{len(measured)} partitions can be formed.",
            "",
            *table(["groups by", "FVU lost"], rows),
        ]

    def between(self) -> list[str]:
        """Return each law's error on each model when fitted on all other models."""
        rows = []
        for law in LAWS:
            frame = known(self.rows["partition"], law)
            cells, fitted = [], []
            for name in self.names:
                rest, mine = frame[frame["model"] != name], frame[frame["model"] == name]
                if rest.empty or mine.empty:
                    cells.append("–")
                    continue
                cells.append(_percent(error(fit(rest, law), mine)))
                fitted.append(fit(mine, law).weights[0])
            ratio = max(fitted) / min(fitted) if fitted and min(fitted) > 0 else float("nan")
            if set(cells) != {"–"}:
                rows.append([_name(law), *cells, "–" if len(law) > 1 else f"{ratio:.1f}"])
        return table(["law", *self.names, "largest weight over smallest"], rows)

    def pairs(self, laws: Sequence[Sequence[str]]) -> list[str]:
        """Return the error on one model (column) of laws fitted on another (row)."""
        rows = []
        for law in laws:
            for trained in self.names:
                frame = self.of("partition", law, trained)
                if frame.empty:
                    continue
                fitted = fit(frame, law)
                cells = []
                for tested in self.names:
                    test = self.of("partition", law, tested)
                    cells.append("–" if test.empty else _percent(error(fitted, test)))
                weights = " + ".join(
                    f"{w:.4f} {name}" for w, name in zip(fitted.weights, law, strict=True)
                )
                rows.append([_name(law), trained, weights, *cells])
        return table(["law", "fitted on", "fit", *(f"on {name}" for name in self.names)], rows)

    def one_law(self) -> list[str]:
        """Return the loss as a share of the FVU of one SAE per layer: measured, and 2.4 V."""
        rows = []
        for name in self.names:
            frame = self.of("partition", (BEST,), name)
            rule = "complete" if name in self.trained else "published"
            frame = frame[frame["name"].str.contains(rule) & (frame[BEST] > 0)]
            means = frame.groupby("G")[["lost", "per_layer", BEST]].mean().astype(float)
            for count, mean in means.iterrows():
                shares = (mean["lost"] / mean["per_layer"], LOSS_PER_VARIANCE * mean[BEST])
                cells = [f"{100 * share:.1f} %" for share in shares]
                rows.append([name, str(count), f"{mean[BEST]:.4f}", f"{mean['lost']:.4f}", *cells])
        return table(["model", "G", BEST, "FVU lost", "as a share", "2.4 V"], rows)

    def by_length(self) -> list[str]:
        """Return the law of each length of training: groups of complete linkage only."""
        rows = []
        for name, tokens in sorted({(each.name, each.tokens) for each in self.every}):
            same = [x for x in self.every if (x.name, x.tokens) == (name, tokens)]
            frame = all_rows(same)["partition"]
            frame = frame[(frame["model"] == name) & frame["name"].str.contains("complete")]
            if frame.empty:
                continue
            law = fit(frame, (MEAN + BEST,))
            rows.append(
                [
                    name,
                    f"{tokens:,}",
                    str(len(same)),
                    f"{np.mean([each.own.mean() for each in same]):.4f}",
                    f"{frame.groupby('G')['lost'].mean().mean():.4f}",
                    f"{law.weights[0]:.2f} V",
                    _percent(error(law, frame)),
                ]
            )
        columns = ["model", "tokens", "seeds", "FVU of one SAE per layer", "lost, mean over G"]
        return table([*columns, "share that is lost", "error"], rows)

    def report(self) -> list[str]:
        """Return all tables, line by line."""
        lines = []
        for model in self.trained:
            runs = [each for each in self.models if each.name == model]
            groups = {g for run in runs for g in run.lost if len(g) > 1}
            lines += [
                f"### {model}: inside of one model",
                "",
                f"{len(runs)} seeds; {len(groups)} groups of more than one layer; "
                f"{len(runs[0].partitions)} partitions by rules. {self.ceiling(model)}",
                "",
            ]
            if len(runs[0].partitions) > FEW:
                lines += [*self.within(model), *self.choices(model)]
        return [
            *lines,
            "### Fitted on all other models: error over partitions",
            "",
            *self.between(),
            "### Fitted on one model, tested on each",
            "",
            *self.pairs([("V",), (TIMES + "V",), *((MEAN + name,) for name in RELATIVE)]),
            "### One law for all: the groups of complete linkage (published ones: the paper's)",
            "",
            *self.one_law(),
            "### The law of shorter and longer trainings",
            "",
            *self.by_length(),
        ]

    def draw(self, path: Path) -> None:
        """Draw every partition's loss, and loss as a share, against V; with each model's line."""
        figure = Figure(figsize=(9.0, 4.0), layout="constrained", dpi=150)
        titles = ("FVU lost", "FVU lost, share of the FVU of one SAE per layer")
        for relative, axes in enumerate(figure.subplots(1, 2)):
            for i, name in enumerate(self.names):
                frame = self.of("partition", (BEST,), name)
                if frame.empty:
                    continue
                if relative:
                    frame = frame.assign(lost=frame["lost"] / frame["per_layer"])
                mean = frame.groupby("name")[[BEST, "lost"]].mean()
                axes.plot(*mean.to_numpy().T, "o", ms=4, color=COLOURS[i], label=name)
                end = mean[BEST].max()
                line = [0, fit(frame, (BEST,)).weights[0] * end]
                axes.plot([0, end], line, lw=1, color=COLOURS[i])
            axes.set(xlabel="angular variance V of the partition", ylabel=titles[relative])
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(path)


def _name(law: Sequence[str]) -> str:
    return " + ".join(law)


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.0f} %"


def _two(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _mean(values: Any) -> str:
    return f"{np.mean(list(values)):.4f}"


def study_of(folders: Sequence[Path], tokens: int) -> Study:
    """Return the study of these runs; layers are compared once for each model and text."""
    compared = dict[str, dict[str, Square]]()
    models = []
    for folder in folders:
        measured = read_run(folder).measured
        key = json.dumps(measured, sort_keys=True)
        if key not in compared:
            compared[key] = compare_layers(folder, min(tokens, measured["tokens"]))
        models.append(read_model(folder, compared[key]))
    return Study(models)


def main(arguments: Sequence[str]) -> None:
    """Write tables and figure."""
    if smallest():
        with tempfile.TemporaryDirectory() as output:
            given = [
                f"output={output}",
                "groups=all",
                "groups.rules=[complete]",
                "groups.smaller=[]",
            ]
            train = [sys.executable, "-m", "groupsae.train", *given, *SMALLEST_RUN]
            subprocess.run(train, check=True)
            (run,) = (path.parent for path in Path(output).glob("*/*/*/summary.json"))
            one = study_of([run], 512).models[0]
            study = Study([one, one._replace(seed=1)])  # as if a second seed gave the same
            study.draw(Path(output) / "law.png")
        print("\n".join(study.report()))
        return
    asked = [a.removeprefix("tokens=") for a in arguments if a.startswith("tokens=")]
    folders = [Path(a) for a in arguments if not a.startswith("tokens=")]
    if not folders:
        sys.exit("which runs? python -m benchmarks.law <run folder> <run folder> ...")
    study = study_of(folders, int(asked[0]) if asked else TOKENS)
    lines = study.report()
    study.draw(DOC.with_suffix(".png"))
    write_figures(DOC, BEGIN, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
