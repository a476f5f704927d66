"""How well the latents of each grouping are explained, against one SAE per layer.

Three tables: a row for each explained latent at each layer; a row for each pair of layers of a
shared SAE; a row for each grouping with means over its layers, their differences from one SAE per
layer, and intervals.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import torch
import torch.nn.functional as F
from torch import Tensor

from groupsae.evaluation.intervals import Bootstrap
from groupsae.files.atomic import atomic_write
from groupsae.grouping.groupings import Grouping
from groupsae.interpretation.explain import RESAMPLES
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.sharing import KINDS, kind_of_latent, labels_needed, transfer

LEVEL = 0.95
AT_LAYERS = ("f1", "adjusted_f1", "null_f1", "shift_f1", "one_label_f1")  # of a latent at a layer
LATENTS = (
    "sae", "latent", "layer", "rate", "f1", "null_f1", "shift_f1", "direction_f1", "adjusted_f1",
    "one_label_f1", "label_cost", "all_f1", "all_adjusted_f1", "lexicality", "labels", "kind",
    "match", "cosine", "explanation",
)  # fmt: skip
GROUPINGS = ("grouping", "kind", "rules", "num_groups", "explained", "rare", "matched")
JUDGED = ("detection_f1", "fuzzing_f1")
COMPARED = ("f1", "adjusted_f1", "one_label_f1", "lexicality", *JUDGED)  # against per layer

Explained = Mapping[str, Mapping[str, Any]]  # of `explanations.json`, by SAE
Estimate = np.ndarray  # the value, then that of each resample


@torch.no_grad()
def latents_frame(
    explained: Explained, found: Sequence[Grouping], directions: Mapping[str, Tensor]
) -> pd.DataFrame:
    """Return a row for each explained latent at each layer where it fires often enough.

    - rate: share of tokens on which it fires at this layer;
    - f1, null_f1, shift_f1, adjusted_f1: of the explanation made at this layer;
    - direction_f1: of rules about a random direction of like density, for one latent in sixteen;
    - one_label_f1: F1, at this layer, of the one explanation made from all layers of the group;
      label_cost = one_label_f1 - f1;
    - all_f1, all_adjusted_f1: of that explanation where it fires at any layer;
    - lexicality: area under precision against recall of a table of mean activations by token;
    - labels: explanations that the latent needs (`labels_needed`), kind: how its layers share it;
      both None for SAEs of one layer;
    - match, cosine: of shared SAEs, the nearest latent of the layer's own SAE by the cosine of the
      directions, those of the decoders, [d_sae, d_model].
    """
    own, rows = _per_layer(explained, found), []
    unit = {name: F.normalize(each.float(), dim=1) for name, each in directions.items()}
    for name, sae in explained.items():
        layers, shared = sae["layers"], len(sae["layers"]) > 1
        latents = [row["latent"] for row in sae["latents"]]
        nearest = {
            layer: (unit[name][latents] @ unit[own[layer]].T).max(1)
            for layer in layers
            if shared and layer in own
        }
        for i, row in enumerate(sae["latents"]):
            kinds = [pair["kind"] for pair in row["sharing"]["pairs"]]
            about = {
                "all_f1": row["all"]["scores"]["f1"],
                "all_adjusted_f1": row["all"]["scores"]["adjusted_f1"],
                "lexicality": row["all"]["scores"]["unigram_auprc"],
                "labels": labels_needed(row, layers) if shared else None,
                "kind": kind_of_latent(kinds) if shared else None,
                "explanation": row["all"]["text"],
            }
            for layer in (layer for layer in layers if str(layer) in row["layers"]):
                scores = row["layers"][str(layer)]["scores"]
                one, match = row["transfer"]["all"][str(layer)], nearest.get(layer)
                rows.append(
                    {
                        "sae": name,
                        "latent": row["latent"],
                        "layer": layer,
                        "rate": row["sharing"]["rates"][layers.index(layer)],
                        **{key: scores.get(key) for key in AT_LAYERS[:4]},
                        "direction_f1": row.get("direction_f1", {}).get(str(layer)),
                        "one_label_f1": one,
                        "label_cost": one - scores["f1"],
                        **about,
                        "match": None if match is None else int(match.indices[i]),
                        "cosine": None if match is None else float(match.values[i]),
                    }
                )
    frame = pd.DataFrame(rows, columns=LATENTS)
    numbers = dict.fromkeys(("cosine", "shift_f1", "direction_f1"), float)
    return frame.astype({"labels": "Int64", "match": "Int64", **numbers})


def write_frames(
    collected: Interpretation,
    found: Sequence[Grouping],
    directions: Mapping[str, Tensor],
    seed: int = 0,
) -> None:
    """Write `latents.csv`, `transfer.csv` and `groupings.csv` into `interpretation/`.

    The scores of the newest qualified judge are in the table of groupings.

    Raises:
        UserError: they cannot be written.
    """
    explained = collected.explanations
    latents = latents_frame(explained, found, directions)
    resampled = {name: collected.resampled(name) for name in explained}
    judged = [one for one in collected.judged if one["qualification"]["qualified"]]
    newest = judged[-1] if judged else None
    frames = {
        "latents": latents,
        "transfer": transfer_frame(explained),
        "groupings": groupings_frame(explained, found, latents, seed, resampled, newest),
    }
    for name, frame in frames.items():
        file, hint = collected.folder / f"{name}.csv", "interpret a copy of the run"
        with atomic_write(file, "w", hint=hint, newline="", encoding="utf-8") as handle:
            frame.to_csv(handle, index=False)


def transfer_frame(explained: Explained) -> pd.DataFrame:
    """Return mean tau(a -> b) over the latents of each shared SAE.

    Columns: sae, made_at (a layer, or "all"), layer, tau, latents (with a defined tau).
    """
    rows = []
    for name, sae in explained.items():
        layers = sae["layers"]
        if len(layers) == 1 or not sae["latents"]:
            continue
        sources = [*layers, "all"]
        taus = np.stack([transfer(row, layers, sources) for row in sae["latents"]])
        counts = np.isfinite(taus).sum(0)
        means = np.nansum(taus, 0) / np.where(counts, counts, np.nan)
        for (i, j), mean in np.ndenumerate(means):
            rows.append((name, sources[i], layers[j], mean, counts[i, j]))
    return pd.DataFrame(rows, columns=["sae", "made_at", "layer", "tau", "latents"])


def groupings_frame(
    explained: Explained,
    found: Sequence[Grouping],
    latents: pd.DataFrame,
    seed: int = 0,
    resampled: Mapping[str, np.ndarray | None] | None = None,
    judged: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return a row for each grouping whose SAEs were explained, the run's own one first.

    Values are means over the grouped layers, of each layer the mean over the latents of its SAE:
    those of `latents_frame`, and

    - detection_f1, fuzzing_f1: of a language model's explanations, at the natural rate;
    - tau_1, tau_2, ...: transfer between layers that are so many layers apart;
    - same, narrows, different, unclear, one_layer: shares of the latents of shared SAEs;
    - <metric>_difference: from one SAE per layer; negative: explained worse;
    - matched: pairs of a latent of a shared SAE, at a layer, and its match, if both were explained
      there; matched_cosine, and matched_difference of their F1; random_difference: of the same
      latents and random ones of the layer's own SAE.

    `_low` and `_high` are the ends of 95 % intervals: latents are drawn again, with replacement,
    within each SAE, the same ones for every grouping; for f1 and one_label_f1 the documents of the
    score text are drawn again as well. They say nothing about another training. None where a
    resample has no value.

    `resampled` is F1 on resamples of the documents by SAE, as `explain_sae` returns it; `judged`
    is what a language model has found.
    """
    own = _per_layer(explained, found)
    samples = {
        name: _Sample(
            sae,
            latents[latents["sae"] == name],
            seed,
            (resampled or {}).get(name),
            [] if judged is None else judged["saes"].get(name, {}).get("latents", []),
        )
        for name, sae in explained.items()
        if (latents["sae"] == name).any()
    }
    for sample in samples.values():
        rivals = [samples[own[x]] for x in sample.layers if own.get(x) in samples]
        if len(rivals) == len(sample.layers):
            for metric in sample.estimates.keys() & set(COMPARED):
                if not all(metric in rival.estimates for rival in rivals):
                    continue
                theirs = np.mean([rival.estimates[metric] for rival in rivals], axis=0)
                sample.estimates[f"{metric}_difference"] = sample.estimates[metric] - theirs
            if len(sample.layers) > 1:
                _add_pairs(sample, latents, own, seed)
    rows = []
    for grouping in found:
        names = [grouping.sae_of_layer[layer] for layer in grouping.grouped]
        if samples.keys() >= set(names):
            rows.append(_row(grouping, {name: samples[name] for name in names}))
    frame = pd.DataFrame(rows, columns=None if rows else GROUPINGS)
    return frame if judged is None else frame.assign(judge=judged["judge"]["name"])


class _Sample:
    """The explained latents of an SAE, and the estimates of their means.

    Attributes:
        latents: their numbers.
        estimates: by metric.
        matched: number of latents, each at a layer, whose match was explained there as well.
    """

    def __init__(
        self,
        sae: Mapping[str, Any],
        frame: pd.DataFrame,
        seed: int,
        resampled: np.ndarray | None,
        judged: Sequence[Mapping[str, Any]],
    ) -> None:
        self.layers: list[int] = sae["layers"]
        self.matched, self.frame = 0, frame
        self.drawn, self.rare = sae["drawn"], sae["rare"]
        self.latents = frame["latent"].unique()
        self.bootstrap = Bootstrap(
            np.arange(len(self.latents)), RESAMPLES, LEVEL, seed + crc32(sae["name"].encode())
        )
        self.estimates = {
            name: self.mean(frame[["latent", name]].dropna())
            for name in (*AT_LAYERS, "direction_f1")
        }
        if resampled is not None:
            rows = [i for i, row in enumerate(sae["latents"]) if row["layers"]]
            for place, name in enumerate(("f1", "one_label_f1")):
                values = resampled[rows, :, place].astype(np.float64)
                counts = np.isfinite(values[..., 0]).sum(1)
                sums = (self.bootstrap.weights * np.nansum(values, axis=1).T).sum(1)
                self.estimates[name][1:] = sums / (self.bootstrap.weights @ counts)
        f1, one_label = (self.estimates[name] for name in ("f1", "one_label_f1"))
        self.estimates["label_cost"] = one_label - f1
        for name in JUDGED:
            task = name.removesuffix("_f1")
            found = [(row["latent"], row["judge"][task]["own"]["f1"]) for row in judged]
            if found:
                self.estimates[name] = self.mean(pd.DataFrame(found).dropna())
        once = frame.drop_duplicates("latent")
        self.estimates["lexicality"] = self.mean(once[["latent", "lexicality"]])
        if len(self.layers) > 1:
            self.estimates["labels"] = self.mean(once[["latent", "labels"]].dropna())
            for kind in KINDS:
                share = once[["latent"]].assign(share=(once["kind"] == kind).astype(float))
                self.estimates[kind] = self.mean(share)
            for apart, taus in _transfers(sae).groupby("apart"):
                self.estimates[f"tau_{apart}"] = self.mean(taus[["latent", "tau"]])

    def mean(self, values: pd.DataFrame) -> Estimate:
        """Return the mean of some values (second column) of latents (first column)."""
        by_latent = values.groupby(values.columns[0])[values.columns[1]].agg(["sum", "count"])
        sums, counts = by_latent.reindex(self.latents).fillna(0).to_numpy(float).T
        drawn = self.bootstrap.ratio(sums, counts)
        value = sums.sum() / counts.sum() if counts.any() else np.nan
        return np.concatenate([[value], drawn])


def _row(grouping: Grouping, samples: Mapping[str, _Sample]) -> dict[str, Any]:
    """Return a grouping's row from the samples of its grouped layers' SAEs."""
    saes = list(samples.values())
    row: dict[str, Any] = {
        "grouping": grouping.name,
        "kind": grouping.kind,
        "rules": ",".join(grouping.rules),
        "num_groups": grouping.num_groups,
        "explained": sum(len(sae.latents) for sae in saes),
        "rare": sum(sae.rare for sae in saes) / sum(sae.drawn for sae in saes),
        "matched": sum(sae.matched for sae in saes),
    }
    fewest = min(saes, key=lambda sae: len(sae.latents)).bootstrap
    metrics = dict.fromkeys(name for sae in saes for name in sae.estimates)
    if grouping.kind == "per_layer":  # it differs from itself by nothing
        metrics = {name: None for name in metrics if not name.endswith("_difference")}
    for metric in metrics:
        known = [sae for sae in saes if np.isfinite(sae.estimates.get(metric, [np.nan])[0])]
        if known:
            weights = [len(sae.layers) for sae in known]
            mean = np.average([sae.estimates[metric] for sae in known], axis=0, weights=weights)
            ends = fewest.interval(mean)
            row |= {metric: mean[0], f"{metric}_low": ends["low"], f"{metric}_high": ends["high"]}
    return row


def _add_pairs(sample: _Sample, latents: pd.DataFrame, own: Mapping[int, str], seed: int) -> None:
    """Add the differences of latents from their matches, and from random latents."""
    theirs = latents[["sae", "layer", "latent", "f1"]]
    theirs = theirs.rename(columns={"latent": "match", "f1": "their_f1"})
    ours = sample.frame[["layer", "latent", "f1", "match", "cosine"]]
    ours = ours.assign(sae=ours["layer"].map(own), match=ours["match"].astype("Int64"))
    pairs = ours.merge(theirs, on=["sae", "layer", "match"])
    sample.matched = len(pairs)
    if not len(pairs):
        return
    draws = np.random.default_rng(seed)
    at_random = [
        draws.choice(theirs["their_f1"][theirs["sae"] == own[layer]]) for layer in pairs["layer"]
    ]
    for name, values in (
        ("matched_cosine", pairs["cosine"]),
        ("matched_difference", pairs["f1"] - pairs["their_f1"]),
        ("random_difference", pairs["f1"] - at_random),
    ):
        sample.estimates[name] = sample.mean(pairs[["latent"]].assign(value=values))


def _per_layer(explained: Explained, found: Sequence[Grouping]) -> dict[int, str]:
    """Return layer -> its own SAE, if one SAE per layer was trained and explained."""
    grouping = next((g for g in found if g.kind == "per_layer"), None)
    owner = {} if grouping is None else grouping.sae_of_layer
    return {layer: name for layer, name in owner.items() if name in explained}


def _transfers(sae: Mapping[str, Any]) -> pd.DataFrame:
    """Return every defined transfer of every latent of an SAE: latent, layers apart, tau."""
    layers = np.array(sae["layers"])
    apart = np.abs(layers[:, None] - layers[None, :])
    rows = []
    for row in sae["latents"]:
        tau = transfer(row, sae["layers"])
        held = np.isfinite(tau) & (apart > 0)
        rows.append(
            pd.DataFrame({"latent": row["latent"], "apart": apart[held], "tau": tau[held]})
        )
    return pd.concat(rows)
