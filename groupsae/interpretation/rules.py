"""The offline judge: explanations that are rules, learnt from counts and carried out exactly.

Closest published method: Neuron2Graph (Foote et al., arXiv 2305.19911), whose kind of explanation
and scoring this has; it learns from the latent's firings instead of masked forward passes. A low
score means that no local rule was found, not that the latent cannot be interpreted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from groupsae.interpretation.atoms import PLACES, SHAPES, Atom, Places

MOST_RULES = 8
EVIDENCE = 5000  # firings, and silent places with the same tokens, at most
BACKGROUND = 50_000  # places drawn once for all latents
COMMON = 10  # tokens whose silent places are drawn on purpose
LIKELY, BEST = 800, 200  # atoms to count in the background, and to try
PARTNERS, RULES = 30, 300  # atoms to pair them with, rules to choose from
LEAST_FIRINGS = 3  # that an atom must hold at
LEAST_GAIN = 0.005  # of F1 on the pruning documents


class Rule(NamedTuple):
    """A conjunction of one or two atoms.

    Attributes:
        atoms: all must hold.
        value: mean activation where they do, silent places included.
    """

    atoms: tuple[Atom, ...]
    value: float


class Explanation(NamedTuple):
    """The latent fires where one of the rules holds."""

    rules: tuple[Rule, ...]

    def holds(self, text: Places, where: slice) -> Float[np.ndarray, " position"]:
        """Return the predicted activation at some positions, 0 where no rule holds."""
        predicted = np.zeros(where.stop - where.start, np.float32)
        for rule in self.rules:
            at = text.holds(rule.atoms[0], where)
            for atom in rule.atoms[1:]:
                at = at & text.holds(atom, where)
            np.maximum(predicted, rule.value, out=predicted, where=at)
        return predicted


class Background:
    """Places of the text to explain that all latents share as evidence, and its documents.

    Args:
        text: the text.
        where: the positions to explain.
        grow: which positions rules are grown on; the others prune them.
        counted: positions where latents can fire at all.
        seed: seed of the draw.
    """

    def __init__(
        self,
        text: Places,
        where: slice,
        grow: Bool[np.ndarray, " position"],
        counted: Bool[np.ndarray, " position"] | None = None,
        seed: int = 0,
    ) -> None:
        self.text, self.where, self.grow, self.seed = text, where, grow, seed
        every = np.arange(where.start, where.stop)
        self.population = every if counted is None else every[counted[where]]
        draws = np.random.default_rng([seed, 0])
        count = min(BACKGROUND, len(self.population))
        self.positions = np.sort(draws.choice(self.population, count, replace=False))
        self.atoms = text.atoms(self.positions).tocsc()
        tokens = text.tokens[self.population]
        self.of_token = np.bincount(tokens, minlength=text.vocabulary.size)
        self.by_token = self.population[np.argsort(tokens, kind="stable")]
        self.token_ends = np.cumsum(self.of_token)

    def with_tokens(self, tokens: Int[np.ndarray, " token"]) -> Int[np.ndarray, " position"]:
        """Return all positions of some tokens."""
        ends, counts = self.token_ends, self.of_token
        return np.concatenate([self.by_token[ends[t] - counts[t] : ends[t]] for t in tokens])


class _Weights(NamedTuple):
    """How many places of the text each row of evidence stands for; 0 for rows that do not count.

    Attributes:
        fires: of the latent's firings.
        silent: of silent places with its commonest tokens.
        shared: of the background.
    """

    fires: Float[np.ndarray, " firing"]
    silent: Float[np.ndarray, " silent"]
    shared: Float[np.ndarray, " place"]


class _Table(NamedTuple):
    """At which rows of evidence each of some atoms, or rules, holds: 0 and 1."""

    fires: Float[np.ndarray, "firing rule"]
    silent: Float[np.ndarray, "silent rule"]
    shared: sparse.csc_matrix  # [place, rule]; almost all of it is 0

    def both(self, left: np.ndarray, right: np.ndarray) -> "_Table":
        """Return where both of two columns hold, for pairs of columns."""
        return _Table(
            self.fires[:, left] * self.fires[:, right],
            self.silent[:, left] * self.silent[:, right],
            self.shared[:, left].multiply(self.shared[:, right]).tocsc(),
        )

    def counts(self, weights: _Weights) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of the firings and of the silent places at which each holds."""
        hits = weights.fires @ self.fires
        return hits, weights.silent @ self.silent + self.shared.T @ weights.shared

    def pairs(self, weights: _Weights, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same for all pairs with the first `count` columns, [rule, count]."""
        few = self.shared[:, :count]
        few = sparse.csc_matrix(
            (few.data * weights.shared[few.indices], few.indices, few.indptr), few.shape
        )
        hits = (self.fires * weights.fires[:, None]).T @ self.fires[:, :count]
        misses = (self.silent * weights.silent[:, None]).T @ self.silent[:, :count]
        return hits, misses + (self.shared.T @ few).toarray()

    def uncovered(self, rule: int, weights: _Weights) -> _Weights:
        """Return the weights without the rows at which a rule holds."""
        shared = weights.shared.copy()
        shared[self.shared.indices[slice(*self.shared.indptr[rule : rule + 2])]] = 0.0
        return _Weights(
            weights.fires * (1 - self.fires[:, rule]),
            weights.silent * (1 - self.silent[:, rule]),
            shared,
        )


class _Evidence(NamedTuple):
    """What is known about a latent, split into documents that rules grow on and prune on."""

    own: sparse.csc_matrix  # atoms of its firings and then of its silent places
    shared: sparse.csc_matrix  # atoms of the background
    acts: Float[np.ndarray, " firing"]
    weights: _Weights
    grow: _Weights
    prune: _Weights

    def table(self, atoms: np.ndarray) -> _Table:
        """Return some atoms of all rows."""
        own, count = self.own[:, atoms].toarray(), len(self.acts)
        return _Table(own[:count], own[count:], self.shared[:, atoms])


def learn(
    background: Background,
    positions: Int[np.ndarray, " firing"],
    acts: Float[np.ndarray, " firing"],
    number: int,
) -> Explanation:
    """Return the rules that predict best where a latent fires.

    Evidence are its firings, silent places with its ten commonest tokens, and the background; each
    counts for as many places as it was drawn from. Rules of one or two atoms are added as long as
    they raise F1 on the growing documents and, by 0.005 at least, on those for pruning; one that
    does not help there is deleted. Deterministic.

    Args:
        background: the text to explain.
        positions: where the latent fires in it, ascending.
        acts: its activations there.
        number: of the latent; seeds the draw of evidence.
    """
    if len(positions) < LEAST_FIRINGS:
        return Explanation(())
    evidence = _evidence(background, positions, acts, number)
    rules, table = _candidates(evidence)
    if not rules:
        return Explanation(())
    hits, misses = table.counts(evidence.weights)
    sums = (evidence.acts * evidence.weights.fires) @ table.fires
    return Explanation(
        tuple(
            Rule(
                tuple(background.text.vocabulary.atom(number) for number in rules[i]),
                float(sums[i] / (hits[i] + misses[i])),
            )
            for i in _greedy(table, evidence.grow, evidence.prune)
        )
    )


def _evidence(
    background: Background, positions: np.ndarray, acts: np.ndarray, number: int
) -> _Evidence:
    text, draws = background.text, np.random.default_rng([background.seed, 1, number])
    tokens, counts = np.unique(text.tokens[positions], return_counts=True)
    common = tokens[np.lexsort((tokens, -counts))[:COMMON]]
    alike = np.setdiff1d(background.with_tokens(common), positions, assume_unique=True)
    firing = _drawn(draws, len(positions))
    silent = alike[_drawn(draws, len(alike))]
    outside = ~np.isin(text.tokens[background.positions], common)
    outside &= ~np.isin(background.positions, positions, assume_unique=True)
    rest = len(background.population) - len(positions) - len(alike)
    fires = positions[firing]
    weights = _Weights(
        np.full(len(firing), len(positions) / len(firing), np.float32),
        np.full(len(silent), len(alike) / max(len(silent), 1), np.float32),
        outside.astype(np.float32) * np.float32(rest / max(outside.sum(), 1)),
    )
    grows = [background.grow[rows] for rows in (fires, silent, background.positions)]
    grow = _Weights(*(w * g for w, g in zip(weights, grows, strict=True)))
    prune = _Weights(*(w * ~g for w, g in zip(weights, grows, strict=True)))
    if not grows[0].any():  # all its firings are in documents of one kind
        grow = prune
    elif grows[0].all():
        prune = grow
    own = text.atoms(np.concatenate([fires, silent])).tocsc()
    return _Evidence(own, background.atoms, acts[firing], weights, grow, prune)


def _drawn(draws: np.random.Generator, count: int) -> np.ndarray:
    if count <= EVIDENCE:
        return np.arange(count)
    return np.sort(draws.choice(count, EVIDENCE, replace=False))


def _candidates(evidence: _Evidence) -> tuple[list[tuple[int, ...]], _Table]:
    """Return the best rules by themselves, best first, and where each holds."""
    weights, count = evidence.grow, len(evidence.acts)
    total = float(weights.fires.sum())
    once = np.zeros(evidence.own.shape[0], np.float32)
    once[:count] = 1.0
    support = evidence.own.T @ once
    hits = evidence.own.T @ np.concatenate([weights.fires, 0 * weights.silent])
    known = evidence.own.T @ np.concatenate([0 * weights.fires, weights.silent])
    # an upper bound of F1, without the background, leaves few atoms to count there
    bound = np.where(support >= LEAST_FIRINGS, _f1(hits, known, total), 0.0)
    likely = np.lexsort((np.arange(len(bound)), -bound))[:LIKELY]
    likely = likely[bound[likely] > 0]
    if not len(likely):
        return [], evidence.table(likely)
    f1 = _f1(*evidence.table(likely).counts(weights), total)
    order = np.lexsort((likely, -f1))[:BEST]
    best, f1 = likely[order], f1[order]
    table, partners = evidence.table(best), min(PARTNERS, len(best))
    together = table.fires.T @ table.fires[:, :partners]
    both = _f1(*table.pairs(weights, partners), total)
    # a pair earns its place only if it beats both of its atoms
    better = both > np.maximum(f1[:, None], f1[None, :partners]) + 1e-6
    one, other = np.nonzero(np.tri(len(best), partners, -1) * better * (together >= LEAST_FIRINGS))
    single = np.arange(len(best))
    first, second = np.concatenate([single, one]), np.concatenate([single, other])
    low, high = np.minimum(best[first], best[second]), np.maximum(best[first], best[second])
    scores = np.concatenate([f1, both[one, other]])
    order = np.lexsort((high, low, low != high, -scores))[:RULES]
    rules: list[tuple[int, ...]] = [
        (int(a),) if a == b else (int(a), int(b))
        for a, b in zip(low[order], high[order], strict=True)
    ]
    return rules, table.both(first[order], second[order])


def _greedy(table: _Table, grow: _Weights, prune: _Weights) -> list[int]:
    """Return the rules whose union has the best F1, added one by one and then thinned out."""

    def score(rules: Sequence[int]) -> float:
        left = prune
        for rule in rules:
            left = table.uncovered(rule, left)
        hits = prune.fires.sum() - left.fires.sum()
        before, after = (w.silent.sum() + w.shared.sum() for w in (prune, left))
        return float(_f1(hits, before - after, float(prune.fires.sum())))

    chosen: list[int] = []
    left, hits, misses, total = grow, 0.0, 0.0, float(grow.fires.sum())
    reached = 0.0
    while len(chosen) < MOST_RULES:
        more_hits, more_misses = table.counts(left)
        union = _f1(hits + more_hits, misses + more_misses, total)
        rule = int(union.argmax())  # of equal ones the first: fewer atoms, smaller numbers
        pruned = score([*chosen, rule])
        if rule in chosen or (chosen and pruned < reached + LEAST_GAIN):
            break
        chosen.append(rule)
        hits, misses, reached = hits + more_hits[rule], misses + more_misses[rule], pruned
        left = table.uncovered(rule, left)
    for rule in list(reversed(chosen)):
        rest = [other for other in chosen if other != rule]
        if rest and (without := score(rest)) >= reached:
            chosen, reached = rest, without
    return chosen


def _f1(hits: Any, misses: Any, total: float) -> Any:
    """Return F1 = 2 TP / (2 TP + FP + FN) = 2 TP / (TP + FP + P)."""
    return 2 * hits / np.maximum(hits + misses + total, 1e-12)


# ---- in words -----------------------------------------------------------------------------


def described(explanation: Explanation, strings: Mapping[int, str]) -> str:
    """Return an explanation as text: rules that share their second atom are joined."""
    joined: dict[tuple[Atom, ...], list[Atom]] = {}
    for rule in explanation.rules:
        ordered = sorted(rule.atoms, key=lambda atom: _ORDER.index(atom.kind))
        joined.setdefault(tuple(ordered[1:]) if _names(ordered[0]) else tuple(ordered), []).append(
            ordered[0]
        )
    parts = []
    for rest, firsts in joined.items():
        if _names(firsts[0]):
            words = [_words(atom, strings) for atom in firsts]
            text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
        else:
            text, rest = "any token " + _words(firsts[0], strings), rest[1:]
        parts.append(" ".join([text, *(_words(atom, strings) for atom in rest)]))
    return "; ".join(parts) if parts else "no rule found"


# what an explanation begins with comes first
_ORDER = (
    "token", "shape", "repeated", "bigram_repeated", "token_before", "shape_before",
    "token_before_that", "line", "within_8", "within_32", "place",
)  # fmt: skip


def _names(atom: Atom) -> bool:
    return atom.kind in _ORDER[:4]


def _words(atom: Atom, strings: Mapping[int, str]) -> str:
    form = {
        "token": "`{}`",
        "shape": "{}",
        "repeated": "a token of the last 64 again",
        "bigram_repeated": "a pair of tokens of the last 64 again",
        "token_before": "after `{}`",
        "shape_before": "after {}",
        "token_before_that": "two after `{}`",
        "line": "in a line beginning with `{}`",
        "within_8": "with `{}` among the 8 before",
        "within_32": "with `{}` among the 32 before",
        "place": "{}",
    }[atom.kind]
    if atom.kind in ("shape", "shape_before"):
        return form.format(SHAPES[atom.value])
    if atom.kind == "place":
        return form.format(PLACES[atom.value][2])
    text = strings.get(atom.value, "?")
    return form.format(text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍"))
