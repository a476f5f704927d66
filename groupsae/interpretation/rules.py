"""The offline judge: explanations that are rules, learnt from counts and carried out exactly.

Closest published method: Neuron2Graph (Foote et al., arXiv 2305.19911), whose kind of explanation
and scoring this has; it learns from the latent's firings instead of masked forward passes. A low
score means that no local rule was found, not that the latent cannot be interpreted.

Counts are exact, over every position of a text: sets of positions are bits. A rule is counted
only if its F1 can be high enough.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from groupsae.interpretation.atoms import PLACES, SHAPES, Atom, Held, Places, counted
from groupsae.interpretation.bits import count, packed, unpacked
from groupsae.interpretation.rule_scores import Prediction

MOST_RULES = 8
BEST, PARTNERS = 300, 30  # atoms to try, and to pair them with
PAIRS = 200  # pairs to choose from, next to the atoms by themselves
LEAST_FIRINGS = 3  # that an atom, or a pair, must hold at
LEAST_GAIN = 0.005  # of F1 on the pruning documents
AT_ONCE = 32  # rules that are counted together


class Rule(NamedTuple):
    """A conjunction of one or two atoms."""

    atoms: tuple[Atom, ...]  # all must hold
    value: float  # mean activation where they do, silent places included


def rules_of(entry: Mapping[str, Any]) -> list[Rule]:
    """Return the rules of an entry of `explanations.json`."""
    return [Rule(tuple(Atom(*atom) for atom in r["atoms"]), r["value"]) for r in entry["rules"]]


def predict(rules: Sequence[Rule], held: Held) -> Prediction:
    """Return at which positions of a text each rule holds, and none with a higher value.

    The latent is predicted to fire where one of the rules holds.
    """
    ordered = sorted(rules, key=lambda rule: -rule.value)
    bits = np.zeros((len(ordered), len(held.all)), np.uint64)
    left = held.all
    for level, rule in zip(bits, ordered, strict=True):
        level[:] = left
        for atom in rule.atoms:
            level &= held.bits(held.text.vocabulary.number(atom))
        left = left & ~level
    return Prediction(np.array([rule.value for rule in ordered]), bits, held.size)


class Side(NamedTuple):
    """Documents that rules are grown on, or pruned on."""

    inside: Bool[np.ndarray, " position"]  # which positions belong to them; `bits` are the same
    bits: UInt64[np.ndarray, " word"]
    counts: Int[np.ndarray, " atom"]  # at how many of these positions each atom holds


class Evidence:
    """The first `size` positions of a text: rules grow on some of them, the others prune."""

    def __init__(self, text: Places, size: int, grow: Bool[np.ndarray, " position"]) -> None:
        self.text, self.held = text, Held(text, slice(0, size))
        self.grow, self.prune = (
            Side(inside, packed(inside), text.counts(np.flatnonzero(inside)))
            for inside in (grow[:size], ~grow[:size])
        )


class _Goal(NamedTuple):
    """The places to count rules at, and which of a latent's firings are among them."""

    places: UInt64[np.ndarray, " word"]
    firings: UInt64[np.ndarray, " firing_word"]
    fired: int


class _Rules(NamedTuple):
    """Rules to choose from, each of two atoms; twice the same for a rule of one.

    Attributes:
        atoms: numbers of all atoms.
        places: at which positions each atom holds.
        firings: at which of the latent's firings.
        first, second: the atoms of each rule, as places in `atoms`.
    """

    atoms: Int[np.ndarray, " atom"]
    places: UInt64[np.ndarray, "atom word"]
    firings: UInt64[np.ndarray, "atom firing_word"]
    first: Int[np.ndarray, " rule"]
    second: Int[np.ndarray, " rule"]

    def held(self, rules: Any) -> UInt64[np.ndarray, "*rules word"]:
        """Return at which positions some of the rules hold."""
        return self.places[self.first[rules]] & self.places[self.second[rules]]

    def fired(self, rules: Any) -> UInt64[np.ndarray, "*rules firing_word"]:
        """Return at which firings they hold."""
        return self.firings[self.first[rules]] & self.firings[self.second[rules]]


def learn(
    evidence: Evidence,
    positions: Int[np.ndarray, " firing"],
    acts: Float[np.ndarray, " firing"],
    atoms: Int[np.ndarray, "firing slot"] | None = None,
) -> tuple[Rule, ...]:
    """Return the rules that predict best where a latent fires.

    Rules of one or two atoms are added as long as they raise F1 on the growing documents and, by
    0.005 at least, on those for pruning; one that does not help there is deleted. Deterministic.
    `positions`, ascending, are where it fires in the text to explain; `atoms` what holds there,
    which is looked up if not given.
    """
    if len(positions) < LEAST_FIRINGS:
        return ()
    grow, prune = evidence.grow, evidence.prune
    inside = grow.inside[positions]
    if not inside.any():  # all its firings are in documents of one kind
        grow = prune
    elif inside.all():
        prune = grow
    goals = [
        _Goal(side.bits, packed(inside), int(inside.sum()))
        for side in (grow, prune)
        for inside in [side.inside[positions]]
    ]
    atoms = evidence.text.atoms(positions) if atoms is None else atoms
    rules = _candidates(evidence.held, grow, goals[0], atoms, grow.inside[positions])
    vocabulary, found = evidence.text.vocabulary, []
    for i in _greedy(rules, *goals) if len(rules.first) else ():
        at = unpacked(rules.fired(i), len(positions))
        numbers = sorted({int(rules.atoms[row]) for row in (rules.first[i], rules.second[i])})
        value = float(acts[at].sum(dtype=np.float64) / count(rules.held(i)))
        found.append(Rule(tuple(map(vocabulary.atom, numbers)), value))
    return tuple(found)


def _candidates(
    held: Held,
    side: Side,
    goal: _Goal,
    atoms: Int[np.ndarray, "firing slot"],
    inside: Bool[np.ndarray, " firing"],
) -> _Rules:
    """Return the best atoms by themselves and the best pairs of them, best first."""
    total = len(side.counts)
    known = np.flatnonzero(counted(atoms, total) >= LEAST_FIRINGS)
    hits = counted(atoms[inside], total)[known]
    f1 = _f1(hits, side.counts[known], goal.fired)
    order = np.argsort(-f1, kind="stable")[:BEST]
    order = order[f1[order] > 0]
    best, f1 = known[order], f1[order]
    rows = np.full(total + 1, -1)
    rows[best] = single = np.arange(len(best))
    at = rows[atoms]  # no atom, -1, has the last row
    firing, slot = np.nonzero(at >= 0)
    flags = np.zeros((len(best), len(atoms)), bool)
    flags[at[firing, slot], firing] = True
    one, other = np.tril_indices(len(best), -1, min(PARTNERS, len(best)))
    places = np.array([held.bits(number) for number in best.tolist()], np.uint64)
    pairs = _Rules(best, places.reshape(len(best), len(held.all)), packed(flags), one, other)
    # a pair earns its place only if it beats both of its atoms; it holds where it hits, at least
    fired = pairs.fired(slice(None))
    hits, least = count(fired & goal.firings), np.maximum(f1[one], f1[other]) + 1e-6
    bound = np.where(count(fired) >= LEAST_FIRINGS, _f1(hits, hits, goal.fired), 0.0)
    possible = np.flatnonzero(bound > least)

    def counted_f1(chosen: np.ndarray) -> np.ndarray:
        rules = possible[chosen]
        found = _f1(hits[rules], count(pairs.held(rules) & goal.places), goal.fired)
        return np.where(found > least[rules], found, 0.0)

    both = _highest(bound[possible], counted_f1, PAIRS)
    taken = np.argsort(-both, kind="stable")[:PAIRS]
    taken = taken[both[taken] > 0]
    first = np.concatenate([single, one[possible[taken]]])
    second = np.concatenate([single, other[possible[taken]]])
    low, high = np.minimum(best[first], best[second]), np.maximum(best[first], best[second])
    order = np.lexsort((high, low, low != high, -np.concatenate([f1, both[taken]])))
    return pairs._replace(first=first[order], second=second[order])


def _greedy(rules: _Rules, grow: _Goal, prune: _Goal) -> list[int]:
    """Return the rules whose union has the best F1, added one by one and then thinned out."""

    def score(chosen: Sequence[int]) -> float:
        held, fired = (np.bitwise_or.reduce(x(list(chosen))) for x in (rules.held, rules.fired))
        hits, says = count(fired & prune.firings), count(held & prune.places)
        return float(_f1(hits, says, prune.fired))

    chosen: list[int] = []
    left, hits, says, reached = grow, 0, 0, 0.0
    fired = rules.fired(slice(None))
    while len(chosen) < MOST_RULES:
        more = hits + count(fired & left.firings)

        def union(some: np.ndarray) -> np.ndarray:
            counts = says + count(rules.held(some) & left.places)  # noqa: B023
            return _f1(more[some], counts, grow.fired)  # noqa: B023

        f1 = _highest(_f1(more, says + more - hits, grow.fired), union, 1)
        rule = int(f1.argmax())  # of equal ones the first: fewer atoms, smaller numbers
        pruned = score([*chosen, rule])
        if rule in chosen or (chosen and pruned < reached + LEAST_GAIN):
            break
        chosen.append(rule)
        hits, reached = int(more[rule]), pruned
        left = left._replace(
            places=left.places & ~rules.held(rule), firings=left.firings & ~fired[rule]
        )
        says = int(count(grow.places) - count(left.places))
    for rule in list(reversed(chosen)):
        rest = [other for other in chosen if other != rule]
        if rest and (without := score(rest)) >= reached:
            chosen, reached = rest, without
    return chosen


def _highest(
    bound: Float[np.ndarray, " rule"], f1: Callable[[np.ndarray], np.ndarray], most: int
) -> Float[np.ndarray, " rule"]:
    """Return F1 of the `most` best rules at least, 0 for others; none has more than its bound."""
    found, order = np.zeros(len(bound)), np.argsort(-bound, kind="stable")
    for first in range(0, len(order), AT_ONCE):
        chosen = order[first : first + AT_ONCE]
        if first >= most and bound[chosen[0]] < np.partition(found[order[:first]], -most)[-most]:
            break
        found[chosen] = f1(chosen)
    return found


def _f1(hits: Any, says: Any, fired: int) -> Any:
    """Return F1 = 2 TP / (predicted + true)."""
    return 2 * hits / np.maximum(says + fired, 1)


# ---- in words -----------------------------------------------------------------------------


def described(rules: Sequence[Rule], strings: Mapping[int, str]) -> str:
    """Return rules as text: those that share their second atom are joined."""
    joined: dict[tuple[Atom, ...], list[Atom]] = {}
    for rule in rules:
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


# in the order in which an explanation names them
_FORMS = {
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
}
_ORDER = list(_FORMS)


def _names(atom: Atom) -> bool:
    return atom.kind in _ORDER[:4]


def _words(atom: Atom, strings: Mapping[int, str]) -> str:
    form = _FORMS[atom.kind]
    if atom.kind in ("shape", "shape_before"):
        return form.format(SHAPES[atom.value])
    if atom.kind == "place":
        return form.format(PLACES[atom.value][2])
    text = strings.get(atom.value, "?")
    return form.format(text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍"))
