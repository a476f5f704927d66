"""What probes are fitted on and tested on: single tokens with labels, split by document."""

import difflib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from groupsae.data.formats import endings, explain_read_errors, open_bytes
from groupsae.data.packing import Split, split_of
from groupsae.data.sources import Document, PythonSource
from groupsae.evaluation.labels import CONCEPTS, python_labels
from groupsae.runtime.errors import UserError

SHARE = 0.02  # of the documents in a split, if an SAE's files do not have it
LONGEST = 4096  # tokens of one Python file, so that no file outweighs the others
FEWEST = 8  # documents of either half with a concept, and without: fewer show nothing
MOST_LABELS = 20  # of one file
COLUMNS = ("text", "prompt"), ("label", "target")  # of a file; sae-probes has the second of each


@dataclass(frozen=True)
class Task:
    """A question about some examples, as often answered by yes as by no in either half."""

    name: str
    rows: Int[np.ndarray, " n"]  # numbers of the examples
    positive: Bool[np.ndarray, " n"]

    def only(self, kept: Bool[np.ndarray, " example"]) -> "Task":
        """Return the task without the examples that are not kept."""
        here = kept[self.rows]
        return Task(self.name, self.rows[here], self.positive[here])


@dataclass(frozen=True)
class Examples:
    """Tokens, each in the window of text that the model reads.

    Attributes:
        windows: the tokens of each window.
        window: the window that each example is in.
        position: its place there.
        document: a number of its document.
        test: whether its document is for the test; the others are for fitting.
        tasks: what is asked.
    """

    windows: list[list[int]]
    window: Int[np.ndarray, " example"]
    position: Int[np.ndarray, " example"]
    document: Int[np.ndarray, " example"]
    test: Bool[np.ndarray, " example"]
    tasks: list[Task]

    def used(self) -> "Examples":
        """Return only the examples that a task has."""
        rows = np.unique(np.concatenate([task.rows for task in self.tasks]))
        tasks = [Task(t.name, np.searchsorted(rows, t.rows), t.positive) for t in self.tasks]
        where = (self.window[rows], self.position[rows], self.document[rows])
        return Examples(self.windows, *where, self.test[rows], tasks)

    def described(self) -> list[dict[str, Any]]:
        """Return how many examples each task has in either half, and in how many documents."""
        return [
            {
                "task": task.name,
                "fitted_on": int((~self.test[task.rows]).sum()),
                "tested_on": int(self.test[task.rows].sum()),
                "documents": len(np.unique(self.document[task.rows][self.test[task.rows]])),
            }
            for task in self.tasks
        ]


def python_files(stream: Mapping[str, Any]) -> dict[Split, list[Document]]:
    """Return the files of the standard library by split, as a training on them has it.

    `stream` is that of an SAE's `cfg.json`, with the shares of the splits, if it has any.
    """
    shares = [stream.get(f"{split}_fraction", SHARE) for split in ("heldout", "calibration")]
    found: dict[Split, list[Document]] = {"calibration": [], "heldout": [], "train": []}
    for document in PythonSource().documents():
        found[split_of(document.name, *shares)].append(document)
    return found


class Reader(NamedTuple):
    """How text becomes windows, and how many examples are drawn.

    Attributes:
        tokenizer: of the model.
        context: most tokens of a window.
        opening: the tokens that every window begins with, such as BOS.
        most: most examples with a concept, and without it, in either half.
        seed: of the draw.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int
    opening: list[int]
    most: int
    seed: int

    def balanced(self, name: str, positive: np.ndarray, test: np.ndarray) -> Task:
        """Return a task with as many examples of either answer, in both halves."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        rows: list[np.ndarray] = []
        for half in (~test, test):
            sides = [np.flatnonzero(half & answer) for answer in (positive, ~positive)]
            count = min(self.most, *map(len, sides))
            rows += [rng.choice(side, count, replace=False) for side in sides]
        chosen = np.sort(np.concatenate(rows))
        return Task(name, chosen, positive[chosen])


def python_examples(halves: Sequence[Iterable[Document]], reader: Reader) -> Examples:
    """Return tokens of Python files, with the labels of `CONCEPTS`.

    A token is judged by its first character that is no white space; of a file the first 4,096
    tokens are used.

    Args:
        halves: files to fit probes on, and files to test them on.
        reader: makes windows of them.

    Raises:
        UserError: the tokenizer cannot map tokens to characters, or there are too few files.
    """
    tokenizer, context, opening, *_ = reader
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, so "
            "tokens have no labels: give evaluation.probes.labels=<a csv or jsonl file>."
        )
    windows: list[list[int]] = []
    places: list[tuple[int, int, int, int]] = []  # window, position, document, test
    labels: list[np.ndarray] = []
    body = context - max(1, len(opening))  # a decoder's start token also takes one
    files = [(half, file.text or "") for half, found in enumerate(halves) for file in found]
    for number, (half, text) in enumerate(files):
        if (found := python_labels(text)) is None:
            continue
        encoded: Any = tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=False, verbose=False
        )
        marks = np.stack([found[name] for name in CONCEPTS], axis=1)
        for start in range(0, min(len(encoded["input_ids"]), LONGEST), body):
            here = slice(start, start + body)
            windows.append(opening + encoded["input_ids"][here])
            for at, (first, end) in enumerate(encoded["offset_mapping"][here], len(opening)):
                if (piece := text[first:end]).strip():
                    places.append((len(windows) - 1, at, number, half))
                    labels.append(marks[first + len(piece) - len(piece.lstrip())])
    window, position, document, test = np.array(places, dtype=int).reshape(-1, 4).T
    marked = np.array(labels, dtype=bool).reshape(-1, len(CONCEPTS))
    tasks = []
    for name, positive in zip(CONCEPTS, marked.T, strict=True):
        sides = [(test == half) & (positive == answer) for half in (0, 1) for answer in (0, 1)]
        if min(len(np.unique(document[side])) for side in sides) >= FEWEST:
            tasks.append(reader.balanced(name, positive, test == 1))
    if not tasks:
        raise UserError(
            f"probes on Python need at least {FEWEST} files to fit them on and {FEWEST} to test "
            "them on, and training left out fewer of the standard library (stream."
            "calibration_fraction, stream.heldout_fraction): give evaluation.probes.labels=<a "
            "csv or jsonl file>."
        )
    return Examples(windows, window, position, document, test == 1, tasks).used()


def table_examples(file: Path, reader: Reader) -> Examples:
    """Return the last token of each text of a table, as in sae-probes (arXiv 2502.16681).

    Two labels are one task, more are a task each: one against the rest. Half of the texts, drawn
    at random, are for the test. Texts with the same `document`, if the table has such a column,
    are in the same half; a text that comes twice counts once.

    Raises:
        UserError: the file is damaged, or has not the columns or labels that it needs.
    """
    frame = _table(file)
    text, label = (next((name for name in usual if name in frame), None) for usual in COLUMNS)
    if text is None or label is None:
        raise UserError(
            f"{file} needs the columns text (or prompt) and label (or target); it has: "
            f"{', '.join(map(str, frame)) or 'none'}."
        )
    frame = frame[(frame[text].str.strip() != "") & (frame[label] != "")].drop_duplicates(text)
    names = sorted(frame[label].unique())
    if not 2 <= len(names) <= MOST_LABELS:
        shown = f" ({names[0]})" if len(names) == 1 else ""
        raise UserError(
            f"{file} has {len(names)} different labels{shown} in its column {label}: probes need "
            f"2 to {MOST_LABELS}."
        )
    owner = frame.get("document", frame.index)
    document, every = pd.factorize(owner)
    test = np.random.default_rng(reader.seed).permutation(len(every))[document] < len(every) // 2
    tasks = []
    for name in names if len(names) > 2 else names[1:]:
        positive = (frame[label] == name).to_numpy()
        task = reader.balanced(f"{file.name.split('.')[0]}: {name}", positive, test)
        if len(np.unique(test[task.rows])) < 2:
            raise UserError(
                f"{file} has {int(positive.sum())} texts with the label {name}: too few to fit a "
                "probe on half of them and to test it on the other half."
            )
        tasks.append(task)
    encoded: Any = reader.tokenizer(frame[text].tolist(), add_special_tokens=False, verbose=False)
    windows = [(reader.opening + ids)[: reader.context - 1] for ids in encoded["input_ids"]]
    last = np.array([len(window) - 1 for window in windows])
    return Examples(windows, np.arange(len(last)), last, document, test, tasks).used()


def _table(file: Path) -> pd.DataFrame:
    """Return a table with all values as text; missing ones are empty."""
    kind = endings(file)[0]
    try:
        with explain_read_errors(file), open_bytes(file) as handle:
            if kind in (".jsonl", ".ndjson", ".json"):
                frame = pd.read_json(handle, lines=kind != ".json", dtype=False)
            else:
                frame = pd.read_csv(handle, sep="\t" if kind == ".tsv" else ",", dtype=str)
    except ValueError as error:
        raise UserError(f"{file} cannot be read as {kind or 'csv'}: {error}.") from None
    return frame.astype(object).where(frame.notna(), "").map(str)


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None without one."""
    spec = find_spec(name)
    places = None if spec is None else spec.submodule_search_locations
    return Path(places[0]) if places else None


def files_of(labels: Sequence[str]) -> list[Path]:
    """Return the files that are named: paths, `sae_probes/<name>`, or `sae_probes` for all of it.

    (`python` is none.)

    Raises:
        UserError: one does not exist; the message names the nearest.
    """
    found: list[Path] = []
    for given in (each for each in labels if each != "python"):
        package, _, name = given.partition("/")
        if package != "sae_probes":
            if not Path(given).is_file():
                raise UserError(
                    f"evaluation.probes.labels={given}: there is no such file. Give python, a "
                    "csv or jsonl file, or sae_probes/<name>."
                )
            found.append(Path(given))
            continue
        folder = package_folder("sae_probes")
        if folder is None:
            raise UserError(
                f"evaluation.probes.labels={given} needs the data of the package sae-probes: pip "
                "install --no-deps sae-probes"
            )
        every = sorted(folder.glob("data/cleaned_data/*.csv.zst"))
        files = {file.name.split(".")[0]: file for file in every}
        if name and name not in files:
            near = difflib.get_close_matches(name, files, n=3, cutoff=0.3) or sorted(files)[:3]
            raise UserError(f"sae-probes has no {name}; the nearest are {', '.join(near)}.")
        found += [files[name]] if name else files.values()
    return found
