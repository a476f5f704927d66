"""Properties of a place in a text, of which rules are made.

Only the token itself and tokens before it in the block count, as for the model.

| kind | true at position p if |
|---|---|
| `token`, `token_before`, `token_before_that` | the token at p, p - 1, p - 2 is v |
| `shape`, `shape_before` | the token at p, p - 1 has shape c, one of `SHAPES` |
| `within_8`, `within_32` | v is among the 8, 32 tokens before p |
| `line` | the line of p begins with the token v |
| `repeated` | the token at p is also among the 64 tokens before it |
| `bigram_repeated` | so is the pair of p - 1 and p |
| `place` | p is at one of `PLACES` in its block |
"""

import keyword
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from groupsae.interpretation.bits import packed

KINDS = (
    "token", "token_before", "token_before_that", "within_8", "within_32", "line",
    "shape", "shape_before", "repeated", "bigram_repeated", "place",
)  # fmt: skip
OF_TOKEN = KINDS[:6]  # these exist for every token
FAR, REPEAT = 32, 64
REMEMBERED = 256_000_000  # bytes of the atoms' bits that are kept
CHUNK = 65_536  # positions whose atoms are listed at once
PLACES = (
    (0, 1, "at the first token of a block"),
    (1, 4, "at tokens 1 to 3 of a block"),
    (4, 16, "at tokens 4 to 15 of a block"),
    (16, 10**9, "after token 15 of a block"),
)
# the first that fits; the text of a token without spaces around it
_SHAPES = (
    ("a line end with indentation", r"\s*\n[^\S\n]+"),
    ("a line end", r"\s*\n\s*"),
    ("white space", r"\s+"),
    ("bytes that are no text", r"\s*(?:<0x[0-9A-Fa-f]{2}>)+|[^\x00-\x7f\w]*\ufffd.*"),
    ("a number", r"\s*\d+\s*"),
    ("a Python keyword", r"\s*(?:" + "|".join(keyword.kwlist) + r")\s*"),
    ("an opening bracket", r"\s*[(\[{]+\s*"),
    ("a closing bracket", r"\s*[)\]}]+[:,;]?\s*"),
    ("a quote", r"\s*[rbuf]?[\"'`]+\s*"),
    ("a comma", r"\s*,\s*"),
    ("a full stop", r"\s*\.+\s*"),
    ("a colon", r"\s*:\s*"),
    ("an operator", r"\s*[-+*/%=<>!&|^~@]+\s*"),
    ("an underscore", r"\s*_+\s*"),
    ("a word in capitals", r"\s*[A-Z]{2,}[A-Z_]*\s*"),
    ("a capitalised word", r"\s+[A-Z]\w*\s*"),
    ("a capitalised piece of a word", r"[A-Z]\w*"),
    ("a word", r"\s+[^\W\d_]+\s*"),
    ("a piece of a word", r"[^\W\d_]+"),
    ("a name with digits or underscores", r"\s*\w+\s*"),
    ("other punctuation", r"\s*[^\w\s]+\s*"),
    ("anything else", r"[\s\S]*"),
)
SHAPES = tuple(name for name, _ in _SHAPES)


def shape_of(text: str) -> int:
    """Return the number of a token's shape in `SHAPES`.

    >>> [SHAPES[shape_of(text)] for text in (" def", "(", "12", "ing")]
    ['a Python keyword', 'an opening bracket', 'a number', 'a piece of a word']
    """
    return next(i for i, (_, form) in enumerate(_SHAPES) if re.fullmatch(form, text))


class Atom(NamedTuple):
    """One property: its kind, and the token, shape or place that it is about (else 0)."""

    kind: str
    value: int = 0


class Vocabulary:
    """Numbers for all atoms: of each kind of `OF_TOKEN` one a token, then the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        counts = [size] * len(OF_TOKEN) + [len(SHAPES)] * 2 + [1, 1, len(PLACES)]
        self.first = dict(zip(KINDS, np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        self.total = sum(counts)

    def number(self, atom: Atom) -> int:
        """Return the number of an atom."""
        return self.first[atom.kind] + atom.value

    def atom(self, number: int) -> Atom:
        """Return the atom of a number."""
        kind = max((k for k in KINDS if self.first[k] <= number), key=lambda k: self.first[k])
        return Atom(kind, number - self.first[kind])


class Places:
    """A text whose positions are described by atoms: blocks of `context` tokens on their own.

    `strings` are the texts of all tokens that it may hold.
    """

    def __init__(
        self, tokens: Int[np.ndarray, " position"], context: int, strings: Mapping[int, str]
    ) -> None:
        self.tokens, self.context = tokens.astype(np.int32), context
        self.vocabulary = Vocabulary(max(strings) + 1)
        self.offset = np.arange(len(tokens)) % context
        shapes = np.zeros(self.vocabulary.size, np.int64)
        ends_line = np.zeros(self.vocabulary.size, bool)
        for token, text in strings.items():
            shapes[token], ends_line[token] = shape_of(text), "\n" in text
        self.shape = shapes[self.tokens]
        starts = (self.offset == 0) | np.concatenate([[True], ends_line[self.tokens[:-1]]])
        first = np.maximum.accumulate(np.where(starts, np.arange(len(tokens)), 0))
        self.line = self.tokens[first]
        place = np.searchsorted([low for low, _, _ in PLACES], self.offset, side="right") - 1
        self.place = place

    @cached_property
    def repeated(self) -> Bool[np.ndarray, " position"]:
        """Return where the token occurred before, within `REPEAT` tokens of its block."""
        return self._again(self.tokens)

    @cached_property
    def bigram_repeated(self) -> Bool[np.ndarray, " position"]:
        """Return where token and predecessor occurred before, within `REPEAT` tokens."""
        before = np.concatenate([[0], self.tokens[:-1]]) * self.vocabulary.size
        pairs = np.where(self.offset > 0, before + self.tokens, -1)
        # a block's first token has no predecessor, so it repeats nothing
        return self._again(pairs) & (self.offset > 0)

    def _again(self, values: np.ndarray) -> np.ndarray:
        order = np.argsort(values, kind="stable")
        same = values[order][1:] == values[order][:-1]
        distance = order[1:] - order[:-1]
        again = np.zeros(len(values), bool)
        again[order[1:]] = same & (distance <= np.minimum(REPEAT, self.offset[order[1:]]))
        return again

    def atoms(self, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, "row slot"]:
        """Return the numbers of the atoms that hold at some positions, each once; -1: no atom."""
        first = self.vocabulary.first
        back = np.arange(FAR + 1)
        inside = self.offset[positions, None] >= back
        window = np.where(inside, self.tokens[np.maximum(positions[:, None] - back, 0)], -1)
        columns = [_numbered(window[:, i], first[kind]) for i, kind in enumerate(OF_TOKEN[:3])]
        for kind, width in (("within_8", 8), ("within_32", FAR)):
            seen = np.sort(window[:, 1 : width + 1], axis=1)
            seen[:, 1:][seen[:, 1:] == seen[:, :-1]] = -1
            columns.append(_numbered(seen, first[kind]))
        before = np.where(inside[:, 1], self.shape[np.maximum(positions - 1, 0)], -1)
        columns += [
            _numbered(self.line[positions], first["line"]),
            _numbered(self.shape[positions], first["shape"]),
            _numbered(before, first["shape_before"]),
            _numbered(np.where(self.repeated[positions], 0, -1), first["repeated"]),
            _numbered(np.where(self.bigram_repeated[positions], 0, -1), first["bigram_repeated"]),
            _numbered(self.place[positions], first["place"]),
        ]
        return np.column_stack(columns)

    def counts(self, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, " atom"]:
        """Return at how many of some positions each atom holds."""
        total = self.vocabulary.total
        parts = [positions[i : i + CHUNK] for i in range(0, len(positions) or 1, CHUNK)]
        return np.sum([counted(self.atoms(part), total) for part in parts], axis=0)

    def holds(self, atom: Atom, where: slice) -> Bool[np.ndarray, " position"]:
        """Return at which of some consecutive positions, complete blocks, an atom holds."""
        value = atom.value
        match atom.kind:
            case "shape":
                return self.shape[where] == value
            case "shape_before":
                return self._shifted(self.shape[where] == value, 1)
            case "line":
                return self.line[where] == value
            case "place":
                return self.place[where] == value
            case "repeated" | "bigram_repeated":
                return getattr(self, atom.kind)[where]
            case "within_8" | "within_32":
                found = self._shifted(self.tokens[where] == value, 1)
                by, blocks = 1, found.reshape(-1, self.context)
                while by < (8 if atom.kind == "within_8" else FAR):
                    blocks[:, by:] |= blocks[:, :-by].copy()  # twice as wide each time
                    by *= 2
                return found
        return self._shifted(self.tokens[where] == value, OF_TOKEN.index(atom.kind))

    def _shifted(self, holds: np.ndarray, by: int) -> np.ndarray:
        """Return what held so many positions before, in the same block."""
        moved = np.zeros_like(holds)
        blocks = (-1, self.context)
        moved.reshape(blocks)[:, by:] = holds.reshape(blocks)[:, : self.context - by]
        return moved


def _numbered(values: np.ndarray, first: int) -> np.ndarray:
    return np.where(values < 0, -1, values + first)


def counted(atoms: Int[np.ndarray, "row slot"], total: int) -> Int[np.ndarray, " atom"]:
    """Return in how many rows each of all atoms occurs."""
    return np.bincount(atoms.ravel() + 1, minlength=total + 1)[1:]


class Held:
    """At which positions of a part of a text, complete blocks, each atom holds, as bits."""

    def __init__(self, text: Places, where: slice) -> None:
        self.text, self.size = text, where.stop - where.start
        self.all = packed(np.ones(self.size, bool))

        @lru_cache(max(1000, 8 * REMEMBERED // self.size))
        def bits(number: int) -> UInt64[np.ndarray, " word"]:
            return packed(text.holds(text.vocabulary.atom(number), where))

        self.bits = bits
