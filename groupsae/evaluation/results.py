"""From the sums of the pass to the figures: values, intervals, means over layers, differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groupsae.evaluation.effect import EffectSums, effect_metrics
from groupsae.evaluation.heldout import HeldoutSums, Pair
from groupsae.evaluation.intervals import Bootstrap, Interval
from groupsae.evaluation.latents import density_histogram, layer_profile
from groupsae.evaluation.reconstruction import DENSE, layer_metrics
from groupsae.evaluation.similarity import mmco, mmcs
from groupsae.grouping.groupings import Grouping
from groupsae.grouping.partition import known

COMPARED = ("fvu", "delta_ce", "delta_ce_percent", "kl")  # against per-layer SAEs
AVERAGED = (*COMPARED, "ce_score")  # of groupings; of an SAE everything is
# not a ratio of sums of each sequence, so not worth resampling
WITHOUT_INTERVAL = (
    "explained_variance_dictionary_learning",
    "explained_variance_saebench",
)


@dataclass(frozen=True)
class Estimate:
    """A figure and what it is on each resample of the sequences."""

    value: float
    samples: np.ndarray

    @classmethod
    def mean(cls, estimates: Sequence["Estimate"]) -> "Estimate":
        """Return the mean over several, paired resample by resample."""
        return cls(
            float(np.mean([e.value for e in estimates])),
            np.mean([e.samples for e in estimates], axis=0),
        )

    def __sub__(self, other: "Estimate") -> "Estimate":
        """Return the difference, paired resample by resample."""
        return Estimate(self.value - other.value, self.samples - other.samples)


class Results:
    """The figures of an evaluation.

    Args:
        sums: of the whole pass.
        bootstrap: resamples of its sequences.
    """

    def __init__(self, sums: HeldoutSums, bootstrap: Bootstrap) -> None:
        self.sums, self.bootstrap = sums, bootstrap
        self.clean = self._per_token(sums.clean_ce.values)
        self._layers = {
            layer: {
                "ce_zero": self._per_token(effects.zero.ce),
                "ce_mean": self._per_token(effects.mean.ce),
                "kl_zero": self._per_token(effects.zero.kl),
            }
            for layer, effects in sums.layers.items()
        }
        self._plain = {
            (name, layer): layer_metrics(sums.layers[layer].sums, pair.reconstruction)
            for (name, layer), pair in sums.pairs.items()
        }
        self.estimates: dict[Pair, dict[str, Estimate]] = {
            pair: self._estimates(pair) for pair in sums.pairs
        }

    def to_json(self, costs: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
        """Return everything as plain values.

        Args:
            costs: grouping -> its cost relative to one SAE per layer.
        """
        baseline = next((g for g in self.sums.groupings if g.kind == "per_layer"), None)
        return {
            "ce": self._interval(self.clean),
            "layers": [self._layer(layer) for layer in self.sums.layers],
            "saes": [self._sae(name) for name in self.sums.saes],
            "results": [self._pair(pair) for pair in self.sums.pairs],
            "groupings": [
                {**self._grouping(g, baseline), "cost": dict(costs.get(g.name, {})) or None}
                for g in self.sums.groupings
            ],
            "comparisons": self._comparisons(),
            "similarity": self._similarity(baseline),
        }

    # ---- one SAE on one layer -------------------------------------------------------------

    def _per_token(self, sums: np.ndarray) -> Estimate:
        predictions = self.sums.predictions.values
        total = float(predictions.sum())
        value = float(sums.sum()) / total if total else float("nan")
        return Estimate(value, self.bootstrap.ratio(sums, predictions))

    def _effect(self, sums: EffectSums, layer: int) -> dict[str, Estimate]:
        scale = self._layers[layer]
        parts = {
            "clean": self.clean,
            "ce": self._per_token(sums.ce),
            "kl": self._per_token(sums.kl),
            "zero": scale["ce_zero"],
            "mean": scale["ce_mean"],
            "kl_zero": scale["kl_zero"],
        }
        values = effect_metrics(**{name: part.value for name, part in parts.items()})
        samples = effect_metrics(**{name: part.samples for name, part in parts.items()})
        return {name: Estimate(values[name], samples[name]) for name in values}

    def _estimates(self, pair: Pair) -> dict[str, Estimate]:
        name, layer = pair
        sums, x = self.sums.pairs[pair], self.sums.layers[layer].sums
        plain = self._plain[pair]
        samples = {"fvu": self.bootstrap.fvu(x, sums.reconstruction)} | {
            metric: self.bootstrap.ratio(*both)
            for metric, both in sums.reconstruction.ratios.items()
        }
        rebuilt = {
            metric: Estimate(np.nan if (value := plain[metric]) is None else value, drawn)
            for metric, drawn in samples.items()
        }
        return rebuilt | self._effect(sums.effect, layer)

    def _pair(self, pair: Pair) -> dict[str, Any]:
        name, layer = pair
        shown = self._shown(self.estimates[pair])
        return {"sae": name, "layer": layer, **self._plain[pair], **shown}

    def _layer(self, layer: int) -> dict[str, Any]:
        x, scale = self.sums.layers[layer].sums, self._layers[layer]
        return {
            "layer": layer,
            "rms_norm": float(np.sqrt(x.squares / x.count.sum())),
            "ce_zero": self._interval(scale["ce_zero"]),
            "ce_mean": self._interval(scale["ce_mean"]),
        }

    # ---- one SAE --------------------------------------------------------------------------

    def fired(self, name: str) -> np.ndarray:
        """Return how many tokens each latent fired on, [layer, d_sae], for the SAE's layers."""
        layers = self.sums.saes[name].layers
        return np.stack([self.sums.pairs[name, x].reconstruction.fired for x in layers])

    def tokens(self, name: str) -> np.ndarray:
        """Return the tokens that counted on each of an SAE's layers, [layer]."""
        layers = self.sums.saes[name].layers
        return np.array([int(self.sums.layers[x].sums.count.sum()) for x in layers])

    def _sae(self, name: str) -> dict[str, Any]:
        suite, fired, tokens = self.sums.saes[name], self.fired(name), self.tokens(name)
        config, sae = suite.configs[name], suite.saes[name]
        everywhere, seen = fired.sum(0), int(tokens.sum())
        pairs = [(name, layer) for layer in suite.layers]
        return {
            "name": name,
            "layers": suite.layers,
            "d_sae": sae.d_sae,
            "architecture": type(sae).__name__,
            "width": config.get("width", 1.0),
            "tokens": config.get("tokens"),
            **{metric: self._mean_plain(pairs, metric) for metric in WITHOUT_INTERVAL},
            **self._shown(self._mean(pairs, list(self.estimates[pairs[0]]))),
            "dead": float((everywhere == 0).mean()),
            "dense": float((everywhere > DENSE * seen).mean()),
            "density_histogram": density_histogram(everywhere, seen),
            "profile": layer_profile(fired, tokens, suite.layers).summary(),
        }

    # ---- groupings ------------------------------------------------------------------------

    def _grouping(self, grouping: Grouping, baseline: Grouping | None) -> dict[str, Any]:
        part, owner = grouping.partition, grouping.sae_of_layer
        grouped = grouping.grouped
        against = None
        if baseline is not None and grouping is not baseline:
            mine, theirs = self.over(grouping, grouped), self.over(baseline, grouped)
            against = {name: self._interval(mine[name] - theirs[name]) for name in COMPARED}
        return {
            "name": grouping.name,
            "kind": grouping.kind,
            "rules": grouping.rules,
            "chosen_by": grouping.chosen_by,
            "num_groups": grouping.num_groups,
            "groups": None if part is None else part.groups,
            "amad": None if part is None else known(part.amad),
            "size_weighted_amad": None if part is None else known(part.size_weighted_amad),
            "max_diameter": None if part is None else known(part.max_diameter),
            "saes": list(dict.fromkeys(owner.values())),
            "sae_of_layer": {str(layer): name for layer, name in owner.items()},
            "all_layers": self._shown(self.over(grouping, list(owner))),
            "grouped_layers": self._shown(self.over(grouping, grouped)),
            "against_per_layer": against,
            "spliced_together": self._spliced_together(grouping),
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        """Return each grouping against even spacing and smaller SAEs of equal cost, paired."""
        rows = []
        for mine in self.sums.groupings:
            for other in self.sums.groupings:
                rival = other.kind == "smaller" or (
                    other.kind == "groups" and "even" in other.rules
                )
                if mine is other or mine.kind != "groups" or not rival:
                    continue
                if mine.num_groups != other.num_groups:
                    continue
                ours, theirs = self.over(mine, mine.grouped), self.over(other, other.grouped)
                rows.append(
                    {
                        "grouping": mine.name,
                        "baseline": other.name,
                        **{name: self._interval(ours[name] - theirs[name]) for name in COMPARED},
                    }
                )
        return rows

    def over(self, grouping: Grouping, layers: Sequence[int]) -> dict[str, Estimate]:
        """Return the means of a grouping's metrics over some layers."""
        return self._mean([(grouping.sae_of_layer[layer], layer) for layer in layers], AVERAGED)

    def _mean_plain(self, pairs: Sequence[Pair], metric: str) -> float | None:
        values = [self._plain[pair][metric] for pair in pairs]
        return None if None in values else float(np.mean(values))  # type: ignore[arg-type]

    def _mean(self, pairs: Sequence[Pair], metrics: Sequence[str]) -> dict[str, Estimate]:
        found = [self.estimates[pair] for pair in pairs]
        return {name: Estimate.mean([each[name] for each in found]) for name in metrics}

    def _spliced_together(self, grouping: Grouping) -> dict[str, Interval] | None:
        sums = self.sums.together.get(grouping.name)
        if sums is None:
            return None
        first = next(iter(self.sums.layers))  # ablations play no part in these
        shown = self._effect(sums, first)
        return {
            name: self._interval(shown[name])
            for name in ("ce", "delta_ce", "delta_ce_percent", "kl")
        }

    def _similarity(self, baseline: Grouping | None) -> list[dict[str, Any]]:
        rows = []
        for name, layer in self.sums.firings:
            if baseline is None or baseline.sae_of_layer[layer] == name:
                continue
            other = baseline.sae_of_layer[layer]
            decoders = [self.sums.saes[n].saes[n].directions() for n in (other, name)]
            rows.append(
                {
                    "sae": name,
                    "baseline": other,
                    "layer": layer,
                    "mmcs": float(mmcs(*decoders).double().mean()),
                    "mmco": mmco(self.sums.firings[other, layer], self.sums.firings[name, layer]),
                }
            )
        return rows

    def _interval(self, estimate: Estimate) -> Interval:
        return self.bootstrap.interval(estimate.value, estimate.samples)

    def _shown(self, estimates: Mapping[str, Estimate]) -> dict[str, Interval]:
        return {name: self._interval(estimate) for name, estimate in estimates.items()}
