"""Explanations of latents by a language model, and how well they tell where a latent fires.

Detection asks whether the latent fires in a window; fuzzing, whether the marked tokens are those
on which it fires; intruder, which of five windows does not belong, without an explanation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.interpretation.atoms import Atom, Held, Places
from groupsae.interpretation.explain import choose
from groupsae.interpretation.files import FORMAT, CollectedSAE, Interpretation
from groupsae.interpretation.firings import WINDOW
from groupsae.interpretation.judges import CHARACTERS, Judge, Ledger, Question
from groupsae.interpretation.rules import Explanation, Rule
from groupsae.interpretation.text import EXPLAIN
from groupsae.interpretation.verdicts import (
    TRIALS,
    auc,
    discriminates,
    found_by_grams,
    grams,
    summary,
    trials,
    verdict,
)
from groupsae.interpretation.windows import (
    CONTEXT,
    LatentWindows,
    Protocol,
    Window,
    WindowChooser,
    text_of,
)
from groupsae.runtime.errors import UserError

PLANTED, QUALIFIED = 40, 0.7  # items, least AUC
ASKED = 10  # intruders that a judge is asked to find, of each latent
TASKS = ("detection", "fuzzing")
FRAME = 200  # characters of a question next to its text, about

EXPLAIN_TASK = """\
One unit of a language model fires on the tokens between « and » in these texts. In one short \
sentence: which tokens are these, and in which context? Describe what they share; be specific.

{texts}

Answer with one line that begins with EXPLANATION:"""
DETECT_TASK = 'A unit fires on: "{}"\nDoes it fire anywhere in the text?'
FUZZ_TASK = 'A unit fires on: "{}"\nAre the tokens between « and » those on which it fires?'
INTRUDER_TASK = """\
In four of these five texts a unit of a language model fires on the tokens between « and »; in \
one, tokens are marked at random. Which text does not belong?"""

# by task and latent: probabilities of yes by its own explanation, and by another latent's
Judgements = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]


class Judging:
    """Explains and scores the latents of a run with one judge.

    Args:
        found: what was collected.
        judge: the language model.
        protocol: which windows it sees.
        seed: of all draws.
    """

    def __init__(
        self, found: Interpretation, judge: Judge, protocol: Protocol, seed: int = 0
    ) -> None:
        self.found, self.judge, self.protocol, self.seed = found, judge, protocol, seed
        self.first = (
            found.num_tokens[EXPLAIN] if protocol.apart else 0
        )  # position of score windows
        text = Places(found.tokens, found.context, found.strings)
        self.held = Held(text, slice(self.first, sum(found.num_tokens)))

    def qualification(self) -> dict[str, Any]:
        """Return how well the judge tells true explanations from shuffled ones.

        The explanations name a word; the texts of half of the items contain it. Below an AUC of
        0.7 the judge is not qualified: its scores would say more about it than about the latents.
        """
        items = planted(self.found, self.seed)
        yes = self._ask([question for question, _ in items])
        truth = np.array([true for _, true in items])
        reached = auc(yes[truth], yes[~truth])
        return {
            "items": len(items),
            "failed": int(np.isnan(yes).sum()),
            "auc": reached,
            "qualified": reached is not None and reached >= QUALIFIED,
        }

    def sae(
        self, sae: CollectedSAE, count: int, rules: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return explanations and scores of an SAE's first `count` chosen latents.

        Args:
            sae: what was collected of it.
            count: number of latents; as many as rules have explained, at most.
            rules: the row of each latent in the explanations by rules, scored on the same windows.

        Raises:
            UserError: no explanation could be read.
        """
        chooser = WindowChooser(self.found, sae, self.protocol, self.seed)
        chosen = choose(sae, min(count, len(rules))).latents
        every = {latent: chooser.of(latent) for latent in chosen}
        windows = {latent: each for latent, each in every.items() if each.enough}
        texts = self._explained(windows)
        # neighbours in this order have like density: each is the other's null
        order = sorted(texts, key=lambda latent: (windows[latent].fired, latent))
        other: dict[int, int] = {}  # a single latent has no null
        if len(order) > 1:
            other = {a: order[i + 1 if i + 1 < len(order) else i - 1] for i, a in enumerate(order)}
        answers = self._answers(windows, texts, order, other)
        by_rules = self._answers_of_rules(windows, rules, order, other)
        intruders = self._intruders(windows, order)
        rows = []
        for latent in order:
            shown = windows[latent]
            row: dict[str, Any] = {
                "latent": latent,
                "explanation": texts[latent],
                "null": other.get(latent),
                "rate": shown.rate,
                "fired": shown.fired,
                "overlap": shown.overlap,
                "dropped": shown.dropped,
                "intruder": intruders[latent],
                "discriminates": discriminates(answers["detection"][latent][0], shown.score),
                "windows": [window._asdict() for window in shown.score],
            }
            for name, each in (("judge", answers), ("rules", by_rules)):
                row[name] = {
                    task: {
                        "own": verdict(each[task][latent][0], shown.score, shown.rate),
                        "null": verdict(each[task][latent][1], shown.score, shown.rate),
                        "yes": [None if np.isnan(p) else round(p, 4) for p in own.tolist()],
                    }
                    for task in TASKS
                    for own, _ in [each[task][latent]]
                }
            rows.append(row)
        return {
            "chosen": len(chosen),
            "few_windows": len(every) - len(windows),
            "not_explained": len(windows) - len(texts),
            "mean": {
                name: {
                    task: summary(
                        [{**row, **row[name][task]} for row in rows],
                        [
                            (*each[task][row["latent"]], windows[row["latent"]].score)
                            for row in rows
                        ],
                        self.found.documents,
                        self.seed,
                    )
                    for task in TASKS
                }
                for name, each in (("judge", answers), ("rules", by_rules))
            },
            "intruder": {
                name: _mean([row["intruder"][name] for row in rows]) for name in ("tfidf", "judge")
            },
            "discrimination": _mean([d for row in rows for d in row["discriminates"]]),
            "overlap": _mean([row["overlap"] for row in rows]) or 0.0,
            "latents": rows,
        }

    def _explained(self, windows: Mapping[int, LatentWindows]) -> dict[int, str]:
        """Return the explanations that could be read, after two attempts."""
        found: dict[int, str] = {}
        for attempt in range(2):
            left = [latent for latent in windows if latent not in found]
            prompts = [self._prompt(windows[latent].explain) for latent in left]
            for latent, text in zip(left, self.judge.write(prompts, attempt), strict=True):
                if explanation := read_explanation(text):
                    found[latent] = explanation
        if windows and not found:
            raise UserError(
                f"no explanation could be read from the answers of {self.judge.name} about "
                f"{len(windows)} latents: none has a line that begins with EXPLANATION:. Use a "
                "model that follows instructions; one that reasons first needs more "
                "interpretation.endpoint.answer_tokens. All answers are kept."
            )
        return found

    def _prompt(self, windows: Sequence[Window]) -> str:
        """Return the prompt with as many windows as the judge can read, evenly chosen."""
        step = 1
        while True:
            texts = [text_of(self.found, window, marked=True) for window in windows[::step]]
            numbered = "\n\n".join(f"Text {i}:\n{text}" for i, text in enumerate(texts, 1))
            prompt = EXPLAIN_TASK.format(texts=numbered)
            if len(texts) == 1 or self.judge.fits(prompt):
                return prompt
            step += 1

    def _ask(self, questions: Sequence[Question]) -> np.ndarray:
        """Return the probability of the first option; one more attempt where there is none."""
        return self._options(questions)[:, 0]

    def _options(self, questions: Sequence[Question]) -> np.ndarray:
        if not questions:
            return np.empty((0, 2))
        different = list(dict.fromkeys(questions))
        found = self.judge.answer(different)
        failed = np.flatnonzero(np.isnan(found).any(1)).tolist()
        if failed:
            found[failed] = self.judge.answer([different[i] for i in failed], 1)
        place = {question: i for i, question in enumerate(different)}
        return found[[place[question] for question in questions]]

    def _answers(
        self,
        windows: Mapping[int, LatentWindows],
        texts: Mapping[int, str],
        order: Sequence[int],
        other: Mapping[int, int],
    ) -> Judgements:
        """Return the answers for each latent: by its own explanation, and by another one's."""
        found: Judgements = {}
        for task, form in zip(TASKS, (DETECT_TASK, FUZZ_TASK), strict=True):
            questions = [
                Question(
                    form.format(texts[explained]),
                    text_of(self.found, window, marked=task == "fuzzing"),
                )
                for latent in order
                for explained in (latent, other.get(latent))
                if explained is not None
                for window in windows[latent].score
            ]
            yes = iter(self._ask(questions))
            found[task] = {
                latent: tuple(  # type: ignore[misc]
                    np.array([next(yes, np.nan) for _ in windows[latent].score]) for _ in range(2)
                )
                for latent in order
            }
        return found

    def _answers_of_rules(
        self,
        windows: Mapping[int, LatentWindows],
        rules: Mapping[int, Mapping[str, Any]],
        order: Sequence[int],
        other: Mapping[int, int],
    ) -> Judgements:
        """Return what the rules predict for the same windows.

        They fire in a window if a rule holds in it; they agree with marks by the share of marked
        tokens at which one holds, and say yes from more than half of them.
        """
        predicted = {latent: self._predicted(rules[latent]) for latent in order}
        found: Judgements = {task: {} for task in TASKS}
        for latent in order:
            shown = windows[latent].score
            for task in TASKS:
                sides = []
                for explained in (latent, other.get(latent)):
                    if explained is None:
                        sides.append(np.full(len(shown), np.nan))
                        continue
                    at = predicted[explained]
                    spans = [at[w.start - self.first :][: w.length] for w in shown]
                    if task == "detection":
                        highest = max(float(at.max(initial=0.0)), 1e-12)
                        yes = [float(s.max()) for s in spans]
                        sides.append(np.array([0.5 + p / highest / 2 if p else 0.0 for p in yes]))
                    else:
                        marked = [s[list(w.marks)] > 0 for s, w in zip(spans, shown, strict=True)]
                        sides.append(np.array([float(m.mean()) for m in marked]))
                found[task][latent] = (sides[0], sides[1])
        return found

    def _predicted(self, row: Mapping[str, Any]) -> np.ndarray:
        rules = [
            Rule(tuple(Atom(*atom) for atom in rule["atoms"]), rule["value"])
            for rule in row["all"]["rules"]
        ]
        return Explanation(tuple(rules)).predict(self.held).at(np.arange(self.held.size))

    def _intruders(
        self, windows: Mapping[int, LatentWindows], order: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """Return the share of intruders that are found: by TF-IDF and by the judge; chance 0.2."""
        ends = {
            (latent, i): self._before(window)
            for latent in order
            for i, window in enumerate(windows[latent].score)
        }
        table = grams(list(ends.values()))
        row_of = {key: row for row, key in enumerate(ends)}
        by_grams, questions, places = {}, [], []
        for latent in order:
            shown = windows[latent].score
            drawn = trials(shown, TRIALS, np.random.default_rng([self.seed, 3, latent]))
            hits = [
                found_by_grams(table, [row_of[latent, i] for i in trial]) == place
                for trial, place in drawn
            ]
            by_grams[latent] = float(np.mean(hits))
            for trial, place in drawn[:ASKED]:
                texts = [text_of(self.found, shown[i], marked=True) for i in trial]
                numbered = "\n\n".join(f"{i}:\n{text}" for i, text in enumerate(texts, 1))
                options = tuple(str(i) for i in range(1, len(trial) + 1))
                questions.append(Question(INTRUDER_TASK, numbered, options))
                places.append(place)
        options_of = self._options(questions)
        found = {}
        for n, latent in enumerate(order):
            part = options_of[n * ASKED : (n + 1) * ASKED]
            answered = ~np.isnan(part).any(1)
            right = part[answered].argmax(1) == np.array(places)[n * ASKED :][:ASKED][answered]
            found[latent] = {
                "tfidf": by_grams[latent],
                "judge": float(right.mean()) if len(right) else None,
                "failed": int((~answered).sum()),
            }
        return found

    def _before(self, window: Window) -> str:
        start = max(window.start, window.peak - CONTEXT + 1)
        return "".join(self.found.text(start, window.peak + 1 - start))


def read_explanation(text: str) -> str | None:
    """Return the explanation in an answer; None if there is none.

    >>> read_explanation("**EXPLANATION:** digits after a dot")
    'digits after a dot'
    """
    found = re.findall(r"EXPLANATION\W*:[^\S\n]*(\S.*)", text, re.IGNORECASE)
    explanation = " ".join(found[-1].strip(" *\"'`[]").split())[:512] if found else ""
    return explanation or None


def planted(found: Interpretation, seed: int) -> list[tuple[Question, bool]]:
    """Return questions whose answers are known: is a word in a text of 32 tokens?

    Half of the explanations are those of other words, which are not in the text.
    """
    draws = np.random.default_rng([seed, 4])
    half, strings = PLANTED // 2, found.strings
    tokens, counts = np.unique(found.tokens, return_counts=True)
    chosen = sorted(
        zip(tokens.tolist(), counts.tolist(), strict=True),
        key=lambda each: (not re.fullmatch(r"\s?\w{3,}", strings[each[0]]), -each[1]),
    )[:half]
    words = [strings[token].strip() or repr(strings[token]) for token, _ in chosen]
    texts = []
    for token, _ in chosen:
        place = int(draws.choice(np.flatnonzero(found.tokens == token)))
        start = max(0, min(place - int(draws.integers(WINDOW)), len(found.tokens) - WINDOW))
        texts.append("".join(found.text(start, WINDOW)))
    items = []
    for n, text in enumerate(texts):
        absent = [word for word in words if word not in text]
        for word, true in (
            (words[n], True),
            *([(absent[n % len(absent)], False)] if absent else []),
        ):
            items.append((Question(DETECT_TASK.format(f"the word {word}"), text), true))
    return items


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return float(np.mean(held)) if held else None


# ---- files --------------------------------------------------------------------------------


def judge_run(
    found: Interpretation,
    explained: Mapping[str, Any],
    judge: Judge,
    protocol: Protocol,
    count: int,
    seed: int,
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Return and write explanations and scores of all SAEs, after each of them.

    Args:
        found: what was collected.
        explained: the explanations by rules.
        judge: the language model.
        protocol: which windows it sees.
        count: latents of each SAE.
        seed: of all draws.
        report: prints a line.

    Raises:
        UserError: the judge cannot be reached, or none of its explanations can be read.
    """
    key = Ledger.key(FORMAT, found.head["key"], judge.identity, protocol, count, seed)
    file = found.folder / "judged" / f"{judge.identity['kind']}-{key[:12]}.json"
    stored = read_json(file)
    if stored is None or stored.get("key") != key:
        stored = {
            "format": FORMAT,
            "key": key,
            "collected": found.head["key"],
            "judge": {"name": judge.name, **judge.identity},
            "protocol": protocol._asdict(),
            "saes": {},
        }
    judging = Judging(found, judge, protocol, seed)
    if "qualification" not in stored:
        stored["qualification"] = judging.qualification()
    if not stored["qualification"]["qualified"]:
        reached = stored["qualification"]["auc"]
        report(
            f"{judge.name} is not qualified: it tells true from shuffled explanations of planted "
            f"words with an AUC of {'none' if reached is None else f'{reached:.2f}'}, "
            f"{QUALIFIED} is needed. Its scores are kept, but not shown."
        )
    for name, sae in found.saes.items():
        if name not in stored["saes"]:
            rows = {row["latent"]: row for row in explained[name]["latents"]}
            stored["saes"][name] = judging.sae(sae, count, rows)
            write_json(file, stored)
    return stored


class Needs(NamedTuple):
    """What a judge has to do: requests, and tokens to read and to write, about."""

    latents: int
    questions: int
    read: int
    written: int


def planned(found: Interpretation, protocol: Protocol, count: int, seed: int) -> Needs:
    """Return what a judge has to do, if it asks about one text at a time."""
    latents = questions = characters = 0
    for sae in found.saes.values():
        chooser = WindowChooser(found, sae, protocol, seed)
        for latent in choose(sae, count).latents:
            shown = chooser.of(latent)
            if not shown.enough:
                continue
            text = sum(len(text_of(found, window, marked=True)) for window in shown.score)
            asked = 2 * len(TASKS) * len(shown.score)  # by its own explanation and the null
            latents, questions = latents + 1, questions + 1 + asked + ASKED
            characters += sum(len(text_of(found, w, marked=True)) for w in shown.explain)
            characters += 2 * len(TASKS) * text + asked * FRAME
            characters += ASKED * (5 * text // len(shown.score) + FRAME)
    return Needs(
        latents,
        questions + PLANTED,
        round((characters + PLANTED * 2 * FRAME) / CHARACTERS),
        questions + 40 * latents,
    )


def read_judged(found: Interpretation) -> list[dict[str, Any]]:
    """Return what all judges have found on the text that was collected, the latest last."""
    files = sorted((found.folder / "judged").glob("*-*.json"), key=lambda f: f.stat().st_mtime)
    every = [read_json(file) or {} for file in files]
    return [one for one in every if one.get("collected") == found.head["key"]]


def ledger_of(folder: Path) -> Ledger:
    """Return all answers of judges that an interpretation has, and where new ones go."""
    return Ledger(folder / "judged" / "answers.jsonl")
