"""The offline judge: explanations that are rules, learnt from counts and carried out exactly.

Closest published method: Neuron2Graph (Foote et al., arXiv 2305.19911), whose kind of explanation
and scoring this has; it learns from the latent's firings instead of masked forward passes. A low
score means that no local rule was found, not that the latent cannot be interpreted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from groupsae.interpretation.atoms import PLACES, SHAPES, Atom, Places

MOST_RULES = 8
EVIDENCE = 5000  # firings, and silent places with the same tokens, at most
BACKGROUND = 50_000  # places drawn once for all latents
COMMON = 10  # tokens whose silent places are drawn on purpose
BEST, PARTNERS, RULES = 200, 30, 300  # atoms to try, atoms to pair them with, rules to choose from
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


class _Evidence(NamedTuple):
    """Rows of places: the latent's own ones, firings first, and then the background.

    Attributes:
        own: atoms of the latent's own rows.
        shared: atoms of the background.
        fires: which rows are firings.
        weight: places of the text that each row stands for; 0 if other rows stand for it.
        acts: activations.
        grow: which rows rules are grown on.
    """

    own: sparse.csc_matrix
    shared: sparse.csc_matrix
    fires: Bool[np.ndarray, " row"]
    weight: Float[np.ndarray, " row"]
    acts: Float[np.ndarray, " row"]
    grow: Bool[np.ndarray, " row"]

    def columns(self, atoms: np.ndarray) -> sparse.csc_matrix:
        """Return some atoms of all rows."""
        return sparse.vstack([self.own[:, atoms], self.shared[:, atoms]], format="csc")

    def counts(self, weight: np.ndarray) -> np.ndarray:
        """Return the sum of the weights of the rows at which each atom holds."""
        own = self.own.shape[0]
        return self.own.T @ weight[:own] + self.shared.T @ weight[own:]


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
    grow = np.where(evidence.grow, evidence.weight, 0.0)
    prune = np.where(evidence.grow, 0.0, evidence.weight)
    if not (evidence.fires & ~evidence.grow).any():
        prune = grow  # all its firings are in documents of one kind
    rules, table = _candidates(evidence, grow)
    if not rules:
        return Explanation(())
    chosen = _greedy(table, evidence.fires, grow, prune)
    found = []
    for i in chosen:
        at = np.flatnonzero(table[:, [i]].toarray().ravel())
        total = evidence.weight[at].sum()
        value = float((evidence.weight[at] * evidence.acts[at]).sum() / total)
        atoms = tuple(background.text.vocabulary.atom(number) for number in rules[i])
        found.append(Rule(atoms, value))
    return Explanation(tuple(found))


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
    rows = np.concatenate([positions[firing], silent])
    weight = np.concatenate(
        [
            np.full(len(firing), len(positions) / len(firing)),
            np.full(len(silent), len(alike) / max(len(silent), 1)),
            np.where(outside, rest / max(outside.sum(), 1), 0.0),
        ]
    )
    every = np.concatenate([rows, background.positions])
    known = np.zeros(len(every))
    known[: len(firing)] = acts[firing]
    return _Evidence(
        text.atoms(rows).tocsc(),
        background.atoms,
        np.arange(len(every)) < len(firing),
        weight,
        known,
        background.grow[every],
    )


def _candidates(
    evidence: _Evidence, weight: np.ndarray
) -> tuple[list[tuple[int, ...]], sparse.csc_matrix]:
    """Return the best rules by themselves, and at which rows each holds."""
    fires, silent = np.where(evidence.fires, weight, 0.0), np.where(evidence.fires, 0.0, weight)
    once = evidence.fires.astype(float)
    support = evidence.counts(once)
    f1 = _f1(evidence.counts(fires), evidence.counts(silent), fires.sum())
    f1[support < LEAST_FIRINGS] = 0.0
    best = np.lexsort((np.arange(len(f1)), -f1))[:BEST]
    best = best[f1[best] > 0]
    if not len(best):
        return [], sparse.csc_matrix((len(weight), 0))
    table = evidence.columns(best)
    partners = table[:, :PARTNERS]

    def together(weights: np.ndarray) -> np.ndarray:
        return np.asarray((table.T @ partners.multiply(weights[:, None]).tocsc()).todense())

    first, second = np.meshgrid(np.arange(len(best)), np.arange(partners.shape[1]), indexing="ij")
    pairs = (second < first) & (together(once) >= LEAST_FIRINGS)
    both = _f1(together(fires), together(silent), fires.sum())
    # a pair earns its place only if it beats both of its atoms
    pairs &= both > np.maximum(f1[best][first], f1[best][second]) + 1e-12
    one, other = first[pairs], second[pairs]
    scores = np.concatenate([f1[best], both[pairs]])
    atoms = np.concatenate([np.ones(len(best)), np.full(len(one), 2)])
    left = np.concatenate([best, np.minimum(best[one], best[other])])
    right = np.concatenate([best, np.maximum(best[one], best[other])])
    order = np.lexsort((right, left, atoms, -scores))[:RULES]
    single = np.arange(len(best))
    left_column = np.concatenate([single, one])[order]
    right_column = np.concatenate([single, other])[order]
    held = table[:, left_column].multiply(table[:, right_column]).tocsc()
    rules: list[tuple[int, ...]] = [
        (int(a),) if a == b else (int(a), int(b))
        for a, b in zip(left[order], right[order], strict=True)
    ]
    return rules, held


def _greedy(
    table: sparse.csc_matrix, fires: np.ndarray, grow: np.ndarray, prune: np.ndarray
) -> list[int]:
    """Return the rules whose union has the best F1, added one by one and then thinned out."""
    by_rule = table.T.tocsr()

    def gains(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return by_rule @ np.where(fires, weight, 0.0), by_rule @ np.where(fires, 0.0, weight)

    def score(rules: Sequence[int], weight: np.ndarray) -> float:
        covered = np.asarray(table[:, list(rules)].sum(1)).ravel() > 0
        hit = weight[covered & fires].sum()
        miss = weight[covered & ~fires].sum()
        return float(_f1(hit, miss, weight[fires].sum()))

    chosen: list[int] = []
    left, hits, misses, total = grow.copy(), 0.0, 0.0, grow[fires].sum()
    reached = 0.0
    while len(chosen) < MOST_RULES:
        more_hits, more_misses = gains(left)
        union = _f1(hits + more_hits, misses + more_misses, total)
        rule = int(union.argmax())  # of equal ones the first: fewer atoms, smaller numbers
        pruned = score([*chosen, rule], prune)
        if rule in chosen or (chosen and pruned < reached + LEAST_GAIN):
            break
        chosen.append(rule)
        hits, misses, reached = hits + more_hits[rule], misses + more_misses[rule], pruned
        left[table.indices[table.indptr[rule] : table.indptr[rule + 1]]] = 0.0
    for rule in list(reversed(chosen)):
        rest = [other for other in chosen if other != rule]
        if rest and score(rest, prune) >= reached:
            chosen, reached = rest, score(rest, prune)
    return chosen


def _f1(hits: np.ndarray, misses: np.ndarray, total: float) -> np.ndarray:
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


def _drawn(draws: np.random.Generator, count: int) -> np.ndarray:
    if count <= EVIDENCE:
        return np.arange(count)
    return np.sort(draws.choice(count, EVIDENCE, replace=False))
