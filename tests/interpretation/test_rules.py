"""Rules: atoms against plain loops, planted latents that must be found, nulls that must not."""

import numpy as np
import pytest

from groupsae.interpretation.atoms import FAR, KINDS, PLACES, REPEAT, Atom, Held, Places, shape_of
from groupsae.interpretation.bits import count, unpacked
from groupsae.interpretation.rule_scores import Truth, scores
from groupsae.interpretation.rules import Evidence, Rule, described, learn, predict

CONTEXT, BLOCKS, VOCABULARY = 64, 500, 120
STRINGS = {i: f" w{'abcdefghij'[i % 10]}{'xyz'[i % 3]}" for i in range(VOCABULARY)} | dict(
    enumerate([" self", "(", ")", "\n    ", "\n", "def", ".", "12"])
)
EVERY = slice(0, CONTEXT * BLOCKS)


@pytest.fixture(scope="module")
def text() -> Places:
    draws = np.random.default_rng(0)
    often = 1 / np.arange(1, VOCABULARY + 1)
    tokens = draws.choice(VOCABULARY, CONTEXT * BLOCKS, p=often / often.sum())
    return Places(tokens, CONTEXT, STRINGS)


@pytest.fixture(scope="module")
def evidence(text) -> Evidence:
    grow = np.random.default_rng(1).random(BLOCKS).repeat(CONTEXT) < 0.8
    return Evidence(text, EVERY.stop, grow)


def plainly(text: Places, atom: Atom, p: int) -> bool:
    """Return whether an atom holds at a position, by its definition."""
    first = p // CONTEXT * CONTEXT
    before = text.tokens[first:p].tolist()
    token, value = int(text.tokens[p]), atom.value
    line = first + max((i + 1 for i, t in enumerate(before) if "\n" in STRINGS[t]), default=0)
    match atom.kind:
        case "token":
            return token == value
        case "token_before":
            return before[-1:] == [value]
        case "token_before_that":
            return before[-2:-1] == [value]
        case "within_8":
            return value in before[-8:]
        case "within_32":
            return value in before[-FAR:]
        case "line":
            return int(text.tokens[line]) == value
        case "shape":
            return shape_of(STRINGS[token]) == value
        case "shape_before":
            return bool(before) and shape_of(STRINGS[before[-1]]) == value
        case "repeated":
            return token in before[-REPEAT:]
        case "bigram_repeated":
            here = [*before, token]
            pairs = list(zip(here, here[1:], strict=False))
            return bool(before) and pairs[-1] in pairs[:-1][-REPEAT:]
    low, high, _ = PLACES[value]
    return low <= p - first < high


def test_atoms_are_what_their_definitions_say(text):
    positions = np.sort(np.random.default_rng(2).choice(EVERY.stop, 150, replace=False))
    held, later = text.atoms(positions), slice(10 * CONTEXT, EVERY.stop)
    among = Held(text, later)
    numbers = [text.vocabulary.number(Atom(kind, value)) for kind in KINDS for value in (0, 1, 3)]
    numbers = [n for n in numbers if n < text.vocabulary.total]
    for number in numbers:
        atom = text.vocabulary.atom(number)
        expected = [plainly(text, atom, int(p)) for p in positions]
        assert ((held == number).sum(1) == expected).all(), atom
        assert text.holds(atom, EVERY)[positions].tolist() == expected, atom
        assert text.counts(positions)[number] == sum(expected), atom
        bits = among.bits(number)
        assert (unpacked(bits, among.size) == text.holds(atom, EVERY)[later]).all(), atom
        assert count(bits) == text.holds(atom, later).sum(), atom


def places(text: Places, *atoms: Atom) -> np.ndarray:
    return np.logical_and.reduce([text.holds(atom, EVERY) for atom in atoms])


PLANTED = {
    "one token": [[Atom("token", 0)]],
    "one of three tokens": [[Atom("token", t)] for t in (30, 31, 32)],
    "two tokens in a row": [[Atom("token", 1), Atom("token_before", 6)]],
    "a token in a line": [[Atom("token", 1), Atom("line", 5)]],
    "a token again": [[Atom("token", 20), Atom("repeated")]],
    "a shape": [[Atom("shape", shape_of("12"))]],
}


@pytest.mark.parametrize("rules", PLANTED.values(), ids=PLANTED)
def test_planted_latents_are_found(text, evidence, rules):
    fires = np.logical_or.reduce([places(text, *atoms) for atoms in rules])
    positions = np.flatnonzero(fires)
    acts = np.random.default_rng(3).random(len(positions)).astype(np.float32) + 1
    found = learn(evidence, positions, acts)
    truth = Truth.of(positions, acts, EVERY.stop)
    assert scores(predict(found, Held(text, EVERY)), truth)["f1"] >= 0.99
    assert learn(evidence, positions, acts, text.atoms(positions)) == found


def test_noise_is_not_explained(text, evidence):
    """F1 of the best guess without knowledge, always to fire, is 2 pi / (1 + pi)."""
    draws, found = np.random.default_rng(4), []
    rate = 0.02
    for _ in range(6):
        fires = draws.random(EVERY.stop) < rate
        half = np.flatnonzero(fires[: EVERY.stop // 2])
        rules = learn(evidence, half, np.ones(len(half), np.float32))
        later = slice(EVERY.stop // 2, EVERY.stop)
        places = np.flatnonzero(fires[later])
        truth = Truth.of(places, np.ones(len(places)), len(fires) // 2)
        found.append(scores(predict(rules, Held(text, later)), truth)["f1"])
    assert np.median(found) <= 2 * rate / (1 + rate) + 0.05


def test_a_latent_that_hardly_fires_has_no_rule(evidence):
    found = learn(evidence, np.array([5, 9]), np.ones(2, np.float32))
    assert found == ()
    assert described(found, STRINGS) == "no rule found"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([[Atom("token", 0)], [Atom("token", 1)]], "` self` or `(`"),
        ([[Atom("token", 1), Atom("line", 5)]], "`(` in a line beginning with `def`"),
        ([[Atom("token_before", 3)]], "any token after `⏎    `"),
        ([[Atom("token", 6)], [Atom("repeated")]], "`.` or a token of the last 64 again"),
        ([[Atom("shape", shape_of("12")), Atom("place", 0)]],
         "a number at the first token of a block"),
    ],
)  # fmt: skip
def test_explanations_in_words(rules, words):
    found = [Rule(tuple(atoms), 1.0) for atoms in rules]
    assert described(found, STRINGS) == words
