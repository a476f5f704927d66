"""Explains latents by rules, scores them on other text, and carries them from layer to layer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from groupsae.data.draws import mix
from groupsae.interpretation.atoms import Places
from groupsae.interpretation.files import CollectedSAE, Interpretation
from groupsae.interpretation.rules import Background, Explanation, described, learn
from groupsae.interpretation.scores import (
    Lookup,
    Truth,
    adjusted,
    entropy_of_tokens,
    f1,
    mean_of,
    scores,
)
from groupsae.interpretation.sharing import (
    benjamini_hochberg,
    cofiring,
    drift,
    kind_of,
    persistence,
    shares,
)
from groupsae.interpretation.text import EXPLAIN

LEAST_WINDOWS = 20  # in which a latent must fire, in each text
GROW = 0.8  # share of the documents that rules are grown on


class Chosen(NamedTuple):
    """The latents to explain, and why others were left out."""

    latents: list[int]
    drawn: int
    rare: int  # of those drawn, fired in fewer than LEAST_WINDOWS windows of a text


def choose(sae: CollectedSAE, count: int) -> Chosen:
    """Return the first `count` recorded latents that fire in enough windows of both texts."""
    windows = np.sum([sae.windows(layer) for layer in sae.layers], axis=0)
    enough = (windows >= LEAST_WINDOWS).all(0)
    latents: list[int] = []
    seen = 0
    for latent in sae.latents.tolist():
        if len(latents) == count:
            break
        seen += 1
        if enough[latent]:
            latents.append(latent)
    return Chosen(latents, seen, seen - len(latents))


class Firing(NamedTuple):
    """A latent's firings on one layer: in the text to explain, and in the score text."""

    positions: np.ndarray
    acts: np.ndarray
    truth: Truth
    enough: bool  # windows on both sides


Place = int | str  # a layer, or "all" of a group together
Firings = dict[Place, Firing]
Predicted = dict[Place, np.ndarray]  # where each explanation holds in the score text


class Explainer:
    """Explains the latents of a run by rules.

    Args:
        found: what was collected.
        documents: number of the document of every position.
    """

    def __init__(self, found: Interpretation, seed: int = 0) -> None:
        self.found, self.explain_tokens = found, found.num_tokens[EXPLAIN]
        total = sum(found.num_tokens)
        self.text = Places(found.tokens, found.context, found.strings)
        self.score = slice(self.explain_tokens, total)
        self.background = Background(
            self.text, slice(0, self.explain_tokens), grows(found.documents), None, seed
        )
        self.lookup = Lookup(
            self.text.tokens, self.explain_tokens, self.text.offset, self.text.vocabulary.size
        )

    def explain(
        self, sae: CollectedSAE, count: int, advance: Callable[[int], object]
    ) -> dict[str, Any]:
        """Return explanations and scores of an SAE's chosen latents, as plain values.

        `advance` is called with 1 after each latent.
        """
        chosen = choose(sae, count)
        records = [sae.records(layer) for layer in sae.layers]
        windows = [sae.windows(layer) for layer in sae.layers]
        rates = np.sum([sae.fired(layer).sum(0) for layer in sae.layers], axis=0)
        # neighbours in this order have like density: each is the other's null
        order = sorted(chosen.latents, key=lambda latent: (rates[latent], latent))
        rows: list[dict[str, Any]] = []
        previous: Predicted = {}
        waiting: tuple[dict[str, Any], Firings] | None = None
        for latent in order:
            firings: Firings = {
                layer: self._firing(records[i], windows[i], latent)
                for i, layer in enumerate(sae.layers)
            }
            firings["all"] = _pooled(list(firings.values()))
            row, predicted = self._one(latent, firings)
            row["sharing"] = self._sharing(sae, latent, firings)
            if previous:
                _compare(row, firings, previous)
            if waiting is not None:
                _compare(*waiting, predicted)
            waiting = None if previous else (row, firings)
            previous = predicted
            rows.append(row)
            advance(1)
        if waiting is not None:  # a single latent has no null
            _compare(*waiting, {})
        rows.sort(key=lambda row: row["latent"])
        _judge_pairs(rows, sae.layers)
        return {
            "name": sae.name,
            "layers": sae.layers,
            "drawn": chosen.drawn,
            "rare": chosen.rare,
            "latents": rows,
            "mean": mean_of([row["all"]["scores"] for row in rows]),
        }

    def _firing(self, records: np.ndarray, windows: np.ndarray, latent: int) -> Firing:
        low, high = np.searchsorted(records["latent"], [latent, latent + 1])
        positions = records["position"][low:high].astype(np.int64)
        acts = records["act"][low:high].astype(np.float32)
        split = int(np.searchsorted(positions, self.explain_tokens))
        truth = Truth(positions[split:] - self.explain_tokens, acts[split:])
        enough = bool((windows[:, latent] >= LEAST_WINDOWS).all())
        return Firing(positions[:split], acts[:split], truth, enough)

    def _sharing(self, sae: CollectedSAE, latent: int, firings: Firings) -> dict[str, Any]:
        """Return how the layers share a latent, and for each pair of them how it drifts."""
        tokens = sum(self.found.num_tokens)
        rates = np.array([sae.fired(layer)[:, latent].sum() / tokens for layer in sae.layers])
        places = [_everywhere(firings[layer], self.explain_tokens) for layer in sae.layers]
        positions = [p for p, _ in places]
        jaccard, contained = cofiring(positions)
        draws = np.random.default_rng([self.background.seed, 2, latent])
        sides = [(self.text.tokens[p], acts, self.found.documents[p]) for p, acts in places]
        pairs = []
        for i, a in enumerate(sae.layers):
            for j, b in enumerate(sae.layers):
                if i < j and firings[a].enough and firings[b].enough:
                    drifted, p = drift(sides[i], sides[j], draws)
                    pairs.append({"layers": [a, b], "drift": drifted, "p": p})
        return {
            **shares(rates),
            "rates": rates.tolist(),
            "mass": [float(sae.mass(layer)[:, latent].sum()) for layer in sae.layers],
            **persistence(positions, tokens),
            "jaccard": jaccard.tolist(),
            "contained": contained.tolist(),
            "pairs": pairs,
        }

    def _one(self, latent: int, firings: Firings) -> tuple[dict[str, Any], Predicted]:
        """Return one latent's row without its nulls, and its predictions as 0 and 1."""
        predicted: Predicted = {}
        row: dict[str, Any] = {"latent": latent, "layers": {}}
        for place, firing in firings.items():
            if not firing.enough:
                continue
            explanation = learn(self.background, firing.positions, firing.acts, latent)
            values = explanation.holds(self.text, self.score)
            predicted[place] = values > 0
            entry: dict[str, Any] = {
                "text": described(explanation, self.found.strings),
                "rules": _plain(explanation),
                "scores": scores(values, firing.truth),
            }
            if place == "all":
                for name, longest in (("unigram", 1), ("lookup", 3)):
                    guess = self.lookup.predict(firing.positions, firing.acts, longest)
                    entry["scores"][f"{name}_auprc"] = scores(guess, firing.truth)["auprc"]
                entry["entropy"] = entropy_of_tokens(self.text.tokens[firing.positions])
                row["all"] = entry
            else:
                row["layers"][place] = entry
        # F1 of the explanation of one layer (or of all) at another
        row["transfer"] = {
            str(a): {str(b): f1(predicted[a], firings[b].truth) for b in firings if b in predicted}
            for a in predicted
        }
        return row, predicted


def _everywhere(firing: Firing, explain_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and activations of a latent in both texts."""
    return (
        np.concatenate([firing.positions, firing.truth.places + explain_tokens]),
        np.concatenate([firing.acts, firing.truth.acts]),
    )


def _judge_pairs(rows: Sequence[dict[str, Any]], layers: Sequence[int]) -> None:
    """Give every pair of layers of every latent its q-value and its kind."""
    pairs = [(row, pair) for row in rows for pair in row["sharing"]["pairs"]]
    tested = [pair for _, pair in pairs if pair["p"] is not None]
    q = benjamini_hochberg(np.array([pair["p"] for pair in tested]))
    for pair, value in zip(tested, q.tolist(), strict=True):
        pair["q"] = value
    for row, pair in pairs:
        tau, sharing = transfer(row, layers), row["sharing"]
        i, j = (layers.index(layer) for layer in pair["layers"])
        pair["tau"] = [None if np.isnan(t) else float(t) for t in (tau[i, j], tau[j, i])]
        pair["kind"] = kind_of(
            (tau[i, j], tau[j, i]),
            (sharing["contained"][i][j], sharing["contained"][j][i]),
            (sharing["rates"][i], sharing["rates"][j]),
            pair["drift"],
            pair.get("q"),
        )


def _pooled(firings: Sequence[Firing]) -> Firing:
    """Return where a latent fires on any layer, with its highest activation there."""
    positions, acts = _highest([(f.positions, f.acts) for f in firings])
    return Firing(positions, acts, Truth(*_highest([f.truth for f in firings])), True)


def _highest(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    places, owner = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
    acts = np.zeros(len(places), np.float32)
    np.maximum.at(acts, owner, np.concatenate([a for _, a in parts]))
    return places, acts


def _compare(row: dict[str, Any], firings: Firings, others: Predicted) -> None:
    """Add the null of each score: F1 of another latent's explanation, of like density."""
    for place, entry in [*row["layers"].items(), ("all", row["all"])]:
        other = others.get(place, others.get("all"))
        found = entry["scores"]
        found["null_f1"] = 0.0 if other is None else f1(other, firings[place].truth)
        found["adjusted_f1"] = adjusted(found["f1"], found["null_f1"])


def grows(documents: np.ndarray) -> np.ndarray:
    """Return which positions belong to documents that rules are grown on, by a hash."""
    import torch  # the hash of the draws

    draws = mix(mix(torch.from_numpy(documents.astype(np.int64)))).numpy() & 0xFFFFFF
    return draws < GROW * 2**24


def transfer(
    row: dict[str, Any], layers: Sequence[int], least: float = 0.1
) -> Float[np.ndarray, "layer layer"]:
    """Return tau(a -> b) = (S(a -> b) - S0(b)) / (S(b -> b) - S0(b)) of one latent.

    S is F1 on the score text of the explanation made from layer a, at layer b; S0 that of another
    latent's explanation. 1: the explanation holds at b as well as b's own. Not a number where b's
    own explanation is less than `least` above S0, or a layer has too few firings.
    """
    tau = np.full((len(layers), len(layers)), np.nan)
    for j, b in enumerate(layers):
        if b not in row["layers"]:
            continue
        null = row["layers"][b]["scores"]["null_f1"]
        own = row["transfer"][str(b)][str(b)] - null
        for i, a in enumerate(layers):
            if own >= least and a in row["layers"]:
                tau[i, j] = (row["transfer"][str(a)][str(b)] - null) / own
    return tau


def cost_of_one_label(row: dict[str, Any], layers: Sequence[int]) -> float | None:
    """Return the mean over layers of S(all -> b) - S(b -> b); None where no layer has its own."""
    own = [b for b in layers if b in row["layers"]]
    lost = [row["transfer"]["all"][str(b)] - row["transfer"][str(b)][str(b)] for b in own]
    return float(np.mean(lost)) if lost else None


def _plain(explanation: Explanation) -> list[dict[str, Any]]:
    return [
        {"atoms": [[atom.kind, atom.value] for atom in rule.atoms], "value": rule.value}
        for rule in explanation.rules
    ]
