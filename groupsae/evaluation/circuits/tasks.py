"""Tasks: pairs of prompts of equal length that need different answers.

Those of `tasks.yaml` are made from templates; a user's own come from a file with one pair a line.
"""

import difflib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped,unused-ignore]
from transformers import PreTrainedTokenizerBase

from groupsae.runtime.errors import UserError

KEYS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")  # of feature-circuits
TRIES = 50  # draws from a template for each pair that is needed
SHIPPED = Path(__file__).with_name("tasks.yaml")


class TooFewPairs(UserError):
    """A task cannot be asked with the tokenizer of a model."""


class Pair(NamedTuple):
    """Two prompts that differ, and the answers of each; all are token ids.

    A pair gives two examples: one with the first prompt as the clean one and the second as the
    patch, and one the other way round.
    """

    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    answers: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Task:
    """A task whose pairs are drawn: some to find circuits, and others to test them."""

    name: str
    train: list[Pair]
    test: list[Pair]


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """Return the tasks of `tasks.yaml` by name, their word lists filled in."""
    found = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    for task in found["tasks"].values():
        task["lists"] = {slot: str(words) for slot, words in task["slots"].items()}
        task["slots"] = {
            slot: found["words"][words] if isinstance(words, str) else words
            for slot, words in task["slots"].items()
        }
    return dict(found["tasks"])


def check_tasks(names: Sequence[str]) -> None:
    """Raise UserError if a task is neither one of ours nor a file of pairs; quick."""
    for name in names:
        if name.endswith(".jsonl"):
            for _ in islice(_lines(Path(name)), 1):
                pass
        elif name not in shipped():
            near = difflib.get_close_matches(name, shipped(), n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(
                f"evaluation.circuits.tasks names {name}, which is no task.{hint} Valid: "
                f"{', '.join(shipped())}, or a file of pairs that ends in .jsonl."
            )


def make_task(
    name: str, tokenizer: PreTrainedTokenizerBase, train: int, test: int, seed: int, bos: bool
) -> Task:
    """Return a task with its pairs, half to find circuits and half to test them.

    Where the fillers are enough, those of the test are others than those of the training.

    Args:
        name: one of ours, or a path to a file that ends in .jsonl.
        tokenizer: of the language model.
        train: pairs to find circuits on, at most.
        test: pairs to test them on, at most.
        seed: of the draws.
        bos: start every prompt with BOS, as the text of the training did.

    Raises:
        TooFewPairs: fewer than two are left for the training or the test.
    """
    read = _Reader(tokenizer, bos)
    if name.endswith(".jsonl"):
        pairs = [pair for line in _lines(Path(name)) if (pair := read.pair(*line))]
        found = _split(pairs, train, test, seed)
    elif halves := _halves(shipped()[name], train + test, seed):
        template = shipped()[name]
        found = [
            read.drawn(template, halves[0], train, seed),
            read.drawn(template, halves[1], test, seed + 1),
        ]
    else:
        template = shipped()[name]
        pairs = read.drawn(template, template["slots"], train + test, seed)
        found = _split(pairs, train, test, seed)
    if min(map(len, found)) < 2:
        raise TooFewPairs(f"too few pairs are left with this tokenizer: {read.reasons}")
    return Task(Path(name).stem, *found)


def _split(pairs: Iterable[Pair], train: int, test: int, seed: int) -> list[list[Pair]]:
    """Return different pairs for the training and the test, in the wanted proportion if few."""
    found: dict[frozenset[tuple[int, ...]], Pair] = {}
    for pair in pairs:
        found.setdefault(frozenset(pair.prompts), pair)
    every = list(found.values())
    random.Random(seed).shuffle(every)
    first = min(train, round(len(every) * train / (train + test)))
    return [every[:first], every[first:][:test]]


class _Reader:
    """Turns texts into pairs of token ids, and counts why it cannot."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: bool) -> None:
        self.tokenizer = tokenizer
        self.start = (int(tokenizer.bos_token_id),) if bos else ()
        self.failed = {"lengths": 0, "answers": 0, "merged": 0, "same": 0}

    def drawn(
        self, template: Mapping[str, Any], slots: Mapping[str, list[Any]], count: int, seed: int
    ) -> list[Pair]:
        """Return so many different pairs of a template, or fewer if it does not give them."""
        made: dict[frozenset[tuple[int, ...]], Pair] = {}
        for drawn in islice(_draws(template, slots, seed), TRIES * count):
            if (pair := self.pair(*drawn)) is not None:
                made.setdefault(frozenset(pair.prompts), pair)
            if len(made) == count:
                break
        return list(made.values())

    def pair(self, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> Pair | None:
        """Return a pair, or None if its prompts or answers cannot be compared."""
        ids = [self._ids(prompt) for prompt in prompts]
        if len(ids[0]) != len(ids[1]):
            self.failed["lengths"] += 1
            return None
        single = [[self._ids(answer) for answer in each] for each in answers]
        if any(len(answer) != 1 for each in single for answer in each):
            self.failed["answers"] += 1
            return None
        for prompt, before, texts, tokens in zip(prompts, ids, answers, single, strict=True):
            joined = [self._ids(prompt + text) for text in texts]
            if joined != [before + token for token in tokens]:
                self.failed["merged"] += 1
                return None
        sets = [tuple(answer[0] for answer in each) for each in single]
        if ids[0] == ids[1] or set(sets[0]) & set(sets[1]) or not all(sets):
            self.failed["same"] += 1
            return None
        first, second = (self.start + tuple(each) for each in ids)
        return Pair((first, second), (sets[0], sets[1]))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def reasons(self) -> str:
        """Return why pairs were left out, in a clause for a message."""
        words = {
            "lengths": "prompts of different length",
            "answers": "an answer of several tokens",
            "merged": "an answer that merges with the end of its prompt",
            "same": "equal prompts or answers",
        }
        found = [f"{n} have {words[why]}" for why, n in self.failed.items() if n]
        return f"{', '.join(found) or 'there are not enough'}. Give at least 4 pairs that pass."


def _halves(
    template: Mapping[str, Any], pairs: int, seed: int
) -> list[dict[str, list[Any]]] | None:
    """Return disjoint fillers for the training and the test; None if too few pairs are left."""
    rng = random.Random(seed)
    halves: list[dict[str, list[Any]]] = [{}, {}]
    shuffled = {
        words: rng.sample(template["slots"][slot], len(template["slots"][slot]))
        for slot, words in template["lists"].items()
    }
    for slot, words in template["lists"].items():
        middle = len(shuffled[words]) // 2
        halves[0][slot], halves[1][slot] = shuffled[words][:middle], shuffled[words][middle:]
    ways = [1, 1]
    for i, half in enumerate(halves):
        taken: dict[str, int] = {}
        for slot, words in template["lists"].items():
            ways[i] *= max(0, len(half[slot]) - taken.get(words, 0))
            taken[words] = taken.get(words, 0) + 1
    return halves if min(ways) >= 2 * pairs else None


def _draws(
    template: Mapping[str, Any], slots: Mapping[str, list[Any]], seed: int
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield prompts and answers of random pairs, without end."""
    rng, lists = random.Random(seed), template["lists"]
    while True:
        filled: dict[str, Any] = {}
        for slot, fillers in slots.items():
            taken = [v for other, v in filled.items() if lists[other] == lists[slot]]
            filled[slot] = rng.choice([word for word in fillers if word not in taken])
        prompts, answers = [], []
        for side in template["pair"]:
            parts = {k: v.format(**filled) for k, v in side.items() if isinstance(v, str)}
            prompts.append(template["prompt"].format(**{**filled, **parts}))
            answer = side["answer"]
            if isinstance(answer, Mapping):
                after, to = (int(answer[end].format(**filled)) for end in ("after", "to"))
                numbers = range(after + 1, to + 1)
                width = len(answer["to"].format(**filled))
                answers.append([f"{number:0{width}d}" for number in numbers])
            else:
                answers.append([parts["answer"]])
        yield prompts, answers


def _lines(file: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield prompts and answers of a file with a pair on each line, as JSON.

    Raises:
        UserError: there is no such file, or a line is not JSON or lacks a key.
    """
    if not file.is_file():
        raise UserError(f"evaluation.circuits.tasks names {file}: there is no such file.")
    with file.open(encoding="utf-8") as handle:
        for number, line in enumerate(filter(str.strip, handle), 1):
            try:
                row = json.loads(line)
                texts = [row[key] for key in KEYS]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"line {number} of {file} is no pair ({error!r}): it must be a JSON object "
                    f"with {', '.join(KEYS)}."
                ) from error
            answers = [[each] if isinstance(each, str) else list(each) for each in texts[2:]]
            yield texts[:2], answers
