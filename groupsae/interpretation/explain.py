"""Explains latents by rules, scores them on other text, and carries them from layer to layer."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt64
from scipy.stats import false_discovery_control

from groupsae.data.draws import mix
from groupsae.evaluation.intervals import Bootstrap
from groupsae.interpretation.atoms import Held, Places
from groupsae.interpretation.bits import contains, unpacked
from groupsae.interpretation.files import CollectedSAE, Interpretation
from groupsae.interpretation.rule_scores import (
    TokenTable,
    Truth,
    adjusted,
    f1,
    mean_of,
    scores,
)
from groupsae.interpretation.rules import Evidence, described, learn, predict
from groupsae.interpretation.sharing import cofiring, drift, kind_of, shares, transfer

LEAST_WINDOWS = 20  # in which a latent must fire, in each text
PART = 16  # latents that are explained together
SECONDS = 0.03  # of one core for an explanation, as benchmarks.interpretation found
GROW = 0.8  # share of the documents that rules are grown on
RESAMPLES = 500  # of the documents of the score text


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


Place = str  # a layer, or "all" of a group together
Firings = dict[Place, Firing]
Predicted = dict[Place, UInt64[np.ndarray, " word"]]  # where explanations hold in the score text
Rows = Iterable[list[dict[str, Any]]]
Resampled = Float[np.ndarray, " resample"]


class Explainer:
    """Explains the latents of a run by rules; `seed` is that of the permutations of `drift`."""

    def __init__(self, found: Interpretation, seed: int = 0) -> None:
        self.found, self.seed = found, seed
        self.explain_tokens, self.score_tokens = found.num_tokens
        self.text = Places(found.tokens, found.context, found.strings)
        self.evidence = Evidence(self.text, self.explain_tokens, grows(found.documents))
        self.scored = Held(self.text, slice(self.explain_tokens, sum(found.num_tokens)))
        later = found.documents[self.explain_tokens :]
        names, self.documents = np.unique(later, return_inverse=True)
        self.resamples = Bootstrap(names, RESAMPLES, 0.95, 0).weights
        self.by_token = TokenTable(self.text.tokens, self.explain_tokens)

    def explain(self, name: str, latents: Sequence[int]) -> list[dict[str, Any]]:
        """Return explanations and scores of some latents of an SAE, as plain values.

        Each is compared with the one before it, so those next to each other should fire about as
        often: a score is worth something where another latent's explanation scores less.
        """
        sae = self.found.saes[name]
        firings = [self.firings(sae, latent) for latent in latents]
        found = [self._one(sae, *each) for each in zip(latents, firings, strict=True)]
        for i, (row, _) in enumerate(found):
            other = found[i - 1 if i else min(1, len(found) - 1)][1] if len(found) > 1 else {}
            _compare(row, firings[i], other)
        middle = len(latents) // 2
        found[middle][0]["direction_f1"] = self._direction(latents[middle], firings[middle])
        return [row for row, _ in found]

    def _direction(self, number: int, firings: Firings) -> dict[Place, float]:
        """Return F1 of rules about a random direction that is as often above a threshold."""
        found = {}
        for layer in (place for place, each in firings.items() if place != "all" and each.enough):
            projected = self.found.projections(int(layer))
            acts = projected[:, number % projected.shape[1]].astype(np.float32)
            text, later = np.split(acts, [self.explain_tokens])
            least = np.sort(text)[-len(firings[layer].positions)]
            positions, places = np.flatnonzero(text >= least), np.flatnonzero(later >= least)
            rules = learn(self.evidence, positions, text[positions] - least)
            truth = Truth.of(places, later[places] - least, self.score_tokens)
            found[layer] = f1(predict(rules, self.scored).anywhere, truth.bits)
        return found

    def _resampled(self, predicted: UInt64[np.ndarray, " word"], truth: Truth) -> Resampled:
        """Return F1 on each resample of the documents of the score text."""
        says = np.flatnonzero(unpacked(predicted, self.score_tokens))
        hits = truth.places[contains(predicted, truth.places)]
        sums = [
            self.resamples @ np.bincount(self.documents[places], minlength=self.resamples.shape[1])
            for places in (hits, says, truth.places)
        ]
        return (2 * sums[0] / np.maximum(sums[1] + sums[2], 1)).astype(np.float16)

    def firings(self, sae: CollectedSAE, latent: int) -> Firings:
        """Return where a latent fires on each layer, and on any, with its highest activation."""
        parts = {str(layer): sae.firings(layer, latent) for layer in sae.layers}
        parts["all"] = highest(list(parts.values()))
        windows = {str(x): sae.windows(x)[:, latent].min() >= LEAST_WINDOWS for x in sae.layers}
        found = {}
        for place, (positions, acts) in parts.items():
            split = int(np.searchsorted(positions, self.explain_tokens))
            places = positions[split:] - self.explain_tokens
            truth = Truth.of(places, acts[split:], self.score_tokens)
            enough = bool(windows.get(place, True))
            found[place] = Firing(positions[:split], acts[:split], truth, enough)
        return found

    def _sharing(self, sae: CollectedSAE, latent: int, firings: Firings) -> dict[str, Any]:
        """Return how the layers share a latent, and for each pair of them how it drifts."""
        tokens = sum(self.found.num_tokens)
        rates = np.array([sae.fired(layer)[:, latent].sum() / tokens for layer in sae.layers])
        fired = [sae.firings(layer, latent) for layer in sae.layers]
        jaccard, contained, together = cofiring([positions for positions, _ in fired], tokens)
        draws, pairs = np.random.default_rng([self.seed, 2, latent]), []
        if len(fired) > 1:
            strongest = [p[np.argsort(-acts, kind="stable")] for p, acts in fired]
            every = np.concatenate(strongest)
            names, numbered = np.unique(self.text.tokens[every], return_inverse=True)
            ends = np.cumsum([len(p) for p in strongest])[:-1]
            sides = list(
                zip(
                    np.split(numbered, ends),
                    np.split(self.found.documents[every], ends),
                    strict=True,
                )
            )
            enough = [i for i, layer in enumerate(sae.layers) if firings[str(layer)].enough]
            for i, j in combinations(enough, 2):
                drifted, p = drift(sides[i], sides[j], len(names), draws)
                pairs.append({"layers": [sae.layers[i], sae.layers[j]], "drift": drifted, "p": p})
        return {
            **shares(rates),
            "rates": rates.tolist(),
            "mass": [float(sae.mass(layer)[:, latent].sum()) for layer in sae.layers],
            **together,
            "jaccard": jaccard.tolist(),
            "contained": contained.tolist(),
            "pairs": pairs,
        }

    def _one(
        self, sae: CollectedSAE, latent: int, firings: Firings
    ) -> tuple[dict[str, Any], Predicted]:
        """Return one latent's row without its nulls, and where its explanations hold."""
        predicted: Predicted = {}
        row: dict[str, Any] = {"latent": latent, "layers": {}}
        anywhere = firings["all"]
        atoms = self.text.atoms(anywhere.positions)
        for place, firing in firings.items():
            if not firing.enough:
                continue
            if place == "all" and len(predicted) == len(sae.layers) == 1:
                (only,) = predicted
                predicted[place], entry = predicted[only], row["layers"][only]
            else:
                rows = np.searchsorted(anywhere.positions, firing.positions)
                learnt = learn(self.evidence, firing.positions, firing.acts, atoms[rows])
                prediction = predict(learnt, self.scored)
                predicted[place] = prediction.anywhere
                entry = {
                    "text": described(learnt, self.found.strings),
                    "rules": [rule._asdict() for rule in learnt],
                    "scores": {
                        **scores(prediction, firing.truth),
                        "shift_f1": f1(predicted[place], self._moved(firing.truth)),
                    },
                }
            if place == "all":
                row["all"] = entry
                entry["scores"]["unigram_auprc"] = self.by_token.auprc(
                    firing.positions, firing.acts, firing.truth.places
                )
            else:
                row["layers"][place] = entry
        # F1 of the explanation of one layer (or of all) at another
        row["transfer"] = {
            a: {b: f1(predicted[a], firings[b].truth.bits) for b in firings if b in predicted}
            for a in predicted
        }
        row["sharing"] = self._sharing(sae, latent, firings)
        row["resampled"] = {
            place: [self._resampled(predicted[a], firings[place].truth) for a in (place, "all")]
            for place in row["layers"]
        }
        return row, predicted

    def _moved(self, truth: Truth) -> UInt64[np.ndarray, " word"]:
        """Return the firings laid onto other documents: half of the blocks further on."""
        blocks = self.score_tokens // self.found.context
        moved = (truth.places + (blocks + 1) // 2 * self.found.context) % self.score_tokens
        return Truth.of(moved, truth.acts, self.score_tokens).bits


def explain_sae(
    found: Interpretation, name: str, count: int, run: Callable[[list[list[int]]], Rows]
) -> tuple[dict[str, Any], Float[np.ndarray, "latent layer explanation resample"]]:
    """Return the explanations of an SAE's chosen latents, and their means.

    With them comes F1 on each resample of the documents, at each layer: of the explanation made
    there, and of the one made from all layers; not a number where a layer has none.

    `run` explains lists of latents, in the order of how often they fire, in this process or in
    several.
    """
    sae = found.saes[name]
    chosen = choose(sae, count)
    rates = np.sum([sae.fired(layer).sum(0) for layer in sae.layers], axis=0)
    order = sorted(chosen.latents, key=lambda latent: (rates[latent], latent))
    rows = [row for part in run(_split(order)) for row in part]
    rows.sort(key=lambda row: row["latent"])
    _judge_pairs(rows, sae.layers)
    resampled = np.full((len(rows), len(sae.layers), 2, RESAMPLES), np.nan, np.float16)
    for each, row in zip(resampled, rows, strict=True):
        for place, values in row.pop("resampled").items():
            each[sae.layers.index(int(place))] = values
    explained = {
        "name": name,
        "layers": sae.layers,
        "drawn": chosen.drawn,
        "rare": chosen.rare,
        "latents": rows,
        "mean": mean_of([row["all"]["scores"] for row in rows]),
    }
    return explained, resampled


def _split(latents: list[int]) -> list[list[int]]:
    """Return parts of `PART` latents, none of them alone if there are several."""
    starts = list(range(0, max(len(latents) - 1, 1), PART))
    return [latents[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


# ---- in several processes ------------------------------------------------------------------

_explainer: Explainer | None = None


def start_worker(folder: Path, seed: int) -> None:
    """Prepare a process that explains latents."""
    global _explainer
    _explainer = Explainer(Interpretation(folder), seed)


def explain_part(name: str, latents: list[int]) -> list[dict[str, Any]]:
    """Return what `Explainer.explain` returns, in a process that `start_worker` prepared."""
    assert _explainer is not None
    return _explainer.explain(name, latents)


def _judge_pairs(rows: Sequence[dict[str, Any]], layers: Sequence[int]) -> None:
    """Give every pair of layers of every latent its q-value and its kind."""
    pairs = [(row, pair) for row in rows for pair in row["sharing"]["pairs"]]
    tested = [pair for _, pair in pairs if pair["p"] is not None]
    q = false_discovery_control([pair["p"] for pair in tested]) if tested else []
    for pair, value in zip(tested, map(float, q), strict=True):
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


def highest(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return all places of several (places, activations), and the highest activation at each."""
    places, owner = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
    acts = np.zeros(len(places), np.float32)
    np.maximum.at(acts, owner, np.concatenate([a for _, a in parts]))
    return places, acts


def _compare(row: dict[str, Any], firings: Firings, others: Predicted) -> None:
    """Add the null of each score: F1 of another latent's explanation, of like density."""
    for place, entry in [*row["layers"].items(), ("all", row["all"])]:
        other = others.get(place, others.get("all"))
        found = entry["scores"]
        found["null_f1"] = 0.0 if other is None else f1(other, firings[place].truth.bits)
        found["adjusted_f1"] = adjusted(found["f1"], found["null_f1"])


def grows(documents: np.ndarray) -> np.ndarray:
    """Return which positions belong to documents that rules are grown on, by a hash."""
    draws = mix(mix(torch.from_numpy(documents.astype(np.int64)))).numpy() & 0xFFFFFF
    return draws < GROW * 2**24
