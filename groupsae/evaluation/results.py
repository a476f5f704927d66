"""From the sums of the pass to the figures: values, intervals, means over layers, differences."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from groupsae.evaluation.effect import effect_metrics
from groupsae.evaluation.embeddings import (
    embedding_metrics,
    reciprocal_ranks,
    reciprocal_ranks_of_chance,
)
from groupsae.evaluation.heldout import HeldoutSums, Pair
from groupsae.evaluation.intervals import Bootstrap, Estimate, Interval, per_layer
from groupsae.evaluation.latents import density_histogram, layer_profile
from groupsae.evaluation.reconstruction import DENSE, SequenceSums, layer_metrics
from groupsae.evaluation.similarity import mmco, mmcs
from groupsae.grouping.groupings import Grouping
from groupsae.grouping.partition import none_if_nan


class Metrics(NamedTuple):
    """Which metrics are computed for what."""

    compared: tuple[str, ...]  # against per-layer SAEs
    averaged: tuple[str, ...]  # of groupings; of an SAE everything is
    spliced: tuple[str, ...]  # with all layers spliced together


COMPARED = ("fvu", "delta_ce", "delta_ce_percent", "kl")
AVERAGED = (*COMPARED, "ce_score")
OF_DECODERS = Metrics(COMPARED, AVERAGED, ("ce", "delta_ce", "delta_ce_percent", "kl"))
_MOVED = ("embedding_loss", "retrieval_loss")
OF_ENCODERS = Metrics(
    ("fvu", *_MOVED), ("fvu", *_MOVED, "embedding_score"), (*_MOVED, "retrieval")
)
# not a ratio of sums of each sequence, so not worth resampling
PLAIN = ("fvu_rest", "explained_variance_dictionary_learning", "explained_variance_saebench")


class Results:
    """The figures of an evaluation.

    Attributes:
        estimates: by metric, for each SAE on each of its layers.
    """

    def __init__(self, sums: HeldoutSums, bootstrap: Bootstrap) -> None:
        self.sums, self.bootstrap = sums, bootstrap
        self.metrics = OF_DECODERS if sums.predicts else OF_ENCODERS
        self._loss = "ce" if sums.predicts else "embedding_loss"
        self.clean = self._per_token(sums.clean["ce"]) if sums.predicts else None
        self.clean_retrieval = None if sums.predicts else self._retrieval(sums.clean)
        self._scales = {
            layer: {
                "zero": self._per_token(effects.zero[self._loss]),
                "mean": self._per_token(effects.mean[self._loss]),
            }
            for layer, effects in sums.layers.items()
        }
        self._plain = {
            (name, layer): layer_metrics(sums.layers[layer].sums, pair.reconstruction)
            for (name, layer), pair in sums.pairs.items()
        }
        self.estimates: dict[Pair, dict[str, Estimate]] = {
            pair: self._rebuilt(pair) | self._effect(sums.pairs[pair].effect, pair[1])
            for pair in sums.pairs
        }

    def to_json(self, costs: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
        """Return everything as plain values; `costs` is grouping -> relative costs."""
        baseline = per_layer(self.sums.groupings)
        clean = {"ce": self.clean, "retrieval": self.clean_retrieval}
        if self.clean is None:
            clean["retrieval_chance"] = self._retrieval_of_chance()
        return {
            **{name: self.bootstrap.interval(x) for name, x in clean.items() if x is not None},
            "layers": [self._layer(layer) for layer in self.sums.layers],
            "saes": [self._sae(name) for name in self.sums.saes],
            "results": [
                {"sae": name, "layer": layer, **self._plain[name, layer], **self._shown(found)}
                for (name, layer), found in self.estimates.items()
            ],
            "groupings": [
                {**self._grouping(g, baseline), "cost": dict(costs.get(g.name, {})) or None}
                for g in self.sums.groupings
            ],
            "comparisons": self._comparisons(),
            "similarity": self._similarity(baseline),
        }

    def _per_token(self, sums: np.ndarray) -> Estimate:
        """Return the mean over predictions, or over embeddings."""
        predictions = self.sums.clean["predictions" if self.sums.predicts else "embeddings"]
        return self.bootstrap.estimate(sums, predictions)

    def _retrieval(self, sums: SequenceSums) -> Estimate:
        ranks, counted = reciprocal_ranks(sums["embedding"], self.bootstrap.owner)
        return self.bootstrap.estimate(ranks, counted)

    def _retrieval_of_chance(self) -> Estimate:
        ranks = reciprocal_ranks_of_chance(self.bootstrap.owner)
        return self.bootstrap.estimate(ranks, (ranks > 0).astype(float))

    def _effect(self, sums: SequenceSums, layer: int) -> dict[str, Estimate]:
        loss, scale = self._per_token(sums[self._loss]), self._scales[layer]
        if self.clean is None:
            assert self.clean_retrieval is not None
            retrieval = self._retrieval(sums)
            return embedding_metrics(
                loss=loss, retrieval=retrieval, clean_retrieval=self.clean_retrieval, **scale
            )
        kl, kl_zero = (
            self._per_token(each["kl"]) for each in (sums, self.sums.layers[layer].zero)
        )
        return effect_metrics(clean=self.clean, ce=loss, kl=kl, kl_zero=kl_zero, **scale)

    def _rebuilt(self, pair: Pair) -> dict[str, Estimate]:
        x, sums = self.sums.layers[pair[1]].sums, self.sums.pairs[pair].reconstruction
        samples = {"fvu": self.bootstrap.fvu(x, sums)}
        samples |= {name: self.bootstrap.ratio(*both) for name, both in sums.ratios.items()}
        plain = self._plain[pair]
        return {
            name: np.array([np.nan if plain[name] is None else plain[name], *drawn])
            for name, drawn in samples.items()
        }

    def _layer(self, layer: int) -> dict[str, Any]:
        x, scale = self.sums.layers[layer].sums, self._scales[layer]
        return {
            "layer": layer,
            "rms_norm": float(np.sqrt(x.squares / x["count"].sum())),
            "largest_share": none_if_nan(x.largest_share),
            f"{self._loss}_zero": self.bootstrap.interval(scale["zero"]),
            f"{self._loss}_mean": self.bootstrap.interval(scale["mean"]),
        }

    def fired(self, name: str) -> np.ndarray:
        """Return how many tokens each latent fired on, [layer, d_sae], for the SAE's layers."""
        layers = self.sums.saes[name].layers
        return np.stack([self.sums.pairs[name, x].reconstruction.fired for x in layers])

    def tokens(self, name: str) -> np.ndarray:
        """Return the tokens that counted on each of an SAE's layers, [layer]."""
        layers = self.sums.saes[name].layers
        return np.array([int(self.sums.layers[x].sums["count"].sum()) for x in layers])

    def _sae(self, name: str) -> dict[str, Any]:
        suite, fired, tokens = self.sums.saes[name], self.fired(name), self.tokens(name)
        config, sae = suite.configs[name], suite.saes[name]
        everywhere, seen = fired.sum(0), int(tokens.sum())
        pairs = [(name, layer) for layer in suite.layers]
        plain: dict[str, list[Any]] = {m: [self._plain[pair][m] for pair in pairs] for m in PLAIN}
        return {
            "name": name,
            "layers": suite.layers,
            "d_sae": sae.d_sae,
            "architecture": type(sae).__name__ + sae.own,
            "width": config.get("width", 1.0),
            "tokens": config.get("tokens"),
            **{k: None if None in v else float(np.mean(v)) for k, v in plain.items()},
            **self._shown(self._mean(pairs, list(self.estimates[pairs[0]]))),
            "dead": float((everywhere == 0).mean()),
            "dense": float((everywhere > DENSE * seen).mean()),
            "density_histogram": density_histogram(everywhere, seen),
            "profile": layer_profile(fired, tokens, suite.layers).summary(),
        }

    def _grouping(self, grouping: Grouping, baseline: Grouping | None) -> dict[str, Any]:
        part, owner, sums = grouping.partition, grouping.sae_of_layer, self.sums.together
        against = together = None
        if baseline is not None and grouping is not baseline:
            against = self._difference(grouping, baseline)
        if grouping.name in sums:
            first = next(iter(self.sums.layers))  # ablations play no part in these
            effect = self._effect(sums[grouping.name], first)
            together = self._shown({name: effect[name] for name in self.metrics.spliced})
        return {
            "name": grouping.name,
            "kind": grouping.kind,
            "rules": grouping.rules,
            "chosen_by": grouping.chosen_by,
            "num_groups": grouping.num_groups,
            "groups": None if part is None else part.groups,
            "amad": None if part is None else none_if_nan(part.amad),
            "size_weighted_amad": None if part is None else none_if_nan(part.size_weighted_amad),
            "max_diameter": None if part is None else none_if_nan(part.max_diameter),
            "variance": None if part is None else none_if_nan(part.variance),
            "saes": list(dict.fromkeys(owner.values())),
            "sae_of_layer": {str(layer): name for layer, name in owner.items()},
            "all_layers": self._shown(self._over(grouping, list(owner))),
            "grouped_layers": self._shown(self._over(grouping, grouping.grouped)),
            "against_per_layer": against,
            "spliced_together": together,
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        """Return each grouping against even spacing and smaller SAEs of equal cost, paired."""
        every = self.sums.groupings
        return [
            {"grouping": ours.name, "baseline": rival.name, **self._difference(ours, rival)}
            for ours in every
            for rival in every
            if ours.kind == "groups" and ours is not rival and ours.num_groups == rival.num_groups
            if rival.kind == "smaller" or (rival.kind == "groups" and "even" in rival.rules)
        ]

    def _difference(self, ours: Grouping, other: Grouping) -> dict[str, Interval]:
        """Return the differences of means, each over the grouping's own grouped layers."""
        mine, theirs = self._over(ours, ours.grouped), self._over(other, other.grouped)
        return self._shown({name: mine[name] - theirs[name] for name in self.metrics.compared})

    def _over(self, grouping: Grouping, layers: Sequence[int]) -> dict[str, Estimate]:
        return self._mean(
            [(grouping.sae_of_layer[layer], layer) for layer in layers],
            self.metrics.averaged,
        )

    def _mean(self, pairs: Sequence[Pair], metrics: Sequence[str]) -> dict[str, Estimate]:
        found = {name: [self.estimates[pair][name] for pair in pairs] for name in metrics}
        return {
            name: np.array(
                [np.mean([x[0] for x in parts]), *np.mean([x[1:] for x in parts], axis=0)]
            )
            for name, parts in found.items()
        }

    def _similarity(self, baseline: Grouping | None) -> list[dict[str, Any]]:
        rows = []
        for name, layer in self.sums.firings:
            if baseline is None or baseline.sae_of_layer[layer] == name:
                continue
            other = baseline.sae_of_layer[layer]
            decoders = [self.sums.saes[n][layer].W_dec for n in (other, name)]
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

    def _shown(self, estimates: Mapping[str, Estimate]) -> dict[str, Interval]:
        return {name: self.bootstrap.interval(estimate) for name, estimate in estimates.items()}
