"""Explanations of latents by a language model, and how well they tell where a latent fires.

Detection asks whether the latent fires in a window; fuzzing, whether the marked tokens are those
on which it fires; intruder, which of five windows does not belong, without an explanation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from groupsae.files.atomic import write_json
from groupsae.files.reading import read_json
from groupsae.interpretation.atoms import Held, Places
from groupsae.interpretation.explain import choose
from groupsae.interpretation.files import FORMAT, CollectedSAE, Interpretation
from groupsae.interpretation.firings import WINDOW
from groupsae.interpretation.judge_scores import (
    Yes,
    auc,
    discriminates,
    mean_of_known,
    summary,
    trials,
    verdict,
)
from groupsae.interpretation.judge_windows import (
    DECILES,
    LatentWindows,
    Protocol,
    Window,
    WindowChooser,
    text_of,
)
from groupsae.interpretation.judges import Judge, Ledger, Question
from groupsae.interpretation.rules import predict, rules_of
from groupsae.interpretation.text import EXPLAIN
from groupsae.runtime.errors import UserError

PLANTED, QUALIFIED = 40, 0.7  # items, least AUC
ASKED = 10  # intruders that a judge is asked to find, of each latent
FRAME = 50  # tokens of a question next to its text, about

EXPLAIN_TASK = """\
One unit of a language model fires on the tokens between « and » in these texts. In one short \
sentence: which tokens are these, and in which context? Describe what they share; be specific.

{texts}

Answer with one line that begins with EXPLANATION:"""
DETECT_TASK = 'A unit fires on: "{}"\nDoes it fire anywhere in the text?'
FUZZ_TASK = 'A unit fires on: "{}"\nAre the tokens between « and » those on which it fires?'
TASKS = {"detection": DETECT_TASK, "fuzzing": FUZZ_TASK}
INTRUDER_TASK = """\
In four of these five texts a unit of a language model fires on the tokens between « and »; in \
one, tokens are marked at random. Which text does not belong?"""

Pair = tuple[int, int]  # a latent, and the one whose explanation is put to the test on it


class Judging:
    """Explains and scores the latents of a run with one judge."""

    def __init__(
        self, found: Interpretation, judge: Judge, protocol: Protocol, seed: int = 0
    ) -> None:
        self.found, self.judge, self.protocol, self.seed = found, judge, protocol, seed
        # position of the score text
        self.first = found.num_tokens[EXPLAIN] if protocol.apart else 0
        text = Places(found.tokens, found.context, found.strings)
        self.held = Held(text, slice(self.first, sum(found.num_tokens)))

    def qualification(self) -> dict[str, Any]:
        """Return how well the judge tells true explanations from shuffled ones.

        The explanations name a word; the texts of half of the items contain it. Below an AUC of
        0.7 the judge is not qualified: its scores would say more about it than about the latents.
        """
        items = planted(self.found, self.seed)
        yes = self._options([question for question, _ in items])[:, 0]
        truth = np.array([true for _, true in items])
        reached = auc(yes[truth], yes[~truth])
        return {
            "items": len(items),
            "failed": int(np.isnan(yes).sum()),
            "auc": None if np.isnan(reached) else reached,
            "qualified": bool(reached >= QUALIFIED),
        }

    def sae(
        self, sae: CollectedSAE, count: int, rules: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return explanations and scores of an SAE's first `count` chosen latents.

        `rules` are the rows of explanations by rules, by latent. They are scored on the same
        windows; as many latents as they explain are judged, at most.

        Raises:
            UserError: no explanation could be read.
        """
        chooser = WindowChooser(self.found, sae, self.protocol, self.seed)
        chosen = choose(sae, min(count, len(rules))).latents
        windows = {latent: each for latent in chosen if (each := chooser.of(latent)).enough}
        texts = self._explained(windows)
        # neighbours in this order have like density: each is the other's null
        order = sorted(texts, key=lambda latent: (windows[latent].fired, latent))
        null: dict[int, int] = {}  # a single latent has none
        if len(order) > 1:
            null = dict(zip(order, [*order[1:], order[-2]], strict=True))
        shown = {latent: windows[latent] for latent in order}
        answers = self._answers(shown, texts, rules, null)
        intruders = self._intruders(shown)
        rows: list[dict[str, Any]] = [
            {
                "latent": latent,
                "explanation": texts[latent],
                "null": null.get(latent),
                "rate": seen.rate,
                "fired": seen.fired,
                "overlap": seen.overlap,
                "dropped": seen.dropped,
                "intruder": intruders[latent],
                "discriminates": discriminates(
                    answers["judge"]["detection"][latent][0], seen.score
                ),
                "windows": [window._asdict() for window in seen.score],
                **{
                    by: {task: _verdicts(seen, *each[latent]) for task, each in tasks.items()}
                    for by, tasks in answers.items()
                },
            }
            for latent, seen in shown.items()
        ]
        means = {
            by: {
                task: summary(
                    [(shown[latent], both) for latent, both in each.items()],
                    self.found.documents,
                    self.seed,
                )
                for task, each in tasks.items()
            }
            for by, tasks in answers.items()
        }
        return {
            "chosen": len(chosen),
            "few_windows": len(chosen) - len(windows),
            "not_explained": len(windows) - len(texts),
            "mean": means,
            "intruder": mean_of_known([each["found"] for each in intruders.values()]),
            "discrimination": mean_of_known([d for row in rows for d in row["discriminates"]]),
            "overlap": mean_of_known([row["overlap"] for row in rows]) or 0.0,
            "latents": rows,
        }

    def _answers(
        self,
        shown: Mapping[int, LatentWindows],
        texts: Mapping[int, str],
        rules: Mapping[int, Mapping[str, Any]],
        null: Mapping[int, int],
    ) -> dict[str, dict[str, dict[int, tuple[Yes, Yes]]]]:
        """Return the answers of the judge and the rules, by task and latent.

        Each latent's are those by its own explanation, and by its null's.
        """
        pairs = [(a, b) for a in shown for b in (a, null.get(a)) if b is not None]
        everywhere = np.arange(self.held.size)
        at = {
            latent: predict(rules_of(rules[latent]["all"]), self.held).at(everywhere)
            for latent in shown
        }
        found = {
            "judge": {task: self._asked(task, pairs, texts, shown) for task in TASKS},
            "rules": {task: self._by_rules(task, pairs, at, shown) for task in TASKS},
        }
        none = {latent: np.full(len(seen.score), np.nan) for latent, seen in shown.items()}
        return {
            by: {
                task: {
                    latent: (yes[latent, latent], yes.get((latent, null.get(latent, -1)), nothing))
                    for latent, nothing in none.items()
                }
                for task, yes in tasks.items()
            }
            for by, tasks in found.items()
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
        for step in range(1, len(windows) + 1):
            texts = [text_of(self.found, window, marked=True) for window in windows[::step]]
            numbered = "\n\n".join(f"Text {i}:\n{text}" for i, text in enumerate(texts, 1))
            prompt = EXPLAIN_TASK.format(texts=numbered)
            if self.judge.fits(prompt):
                break
        return prompt

    def _options(self, questions: Sequence[Question]) -> np.ndarray:
        """Return the options' probabilities; one more attempt where there are none."""
        if not questions:
            return np.empty((0, 2))
        different = list(dict.fromkeys(questions))
        found = self.judge.answer(different)
        failed = np.flatnonzero(np.isnan(found).any(1)).tolist()
        if failed:
            found[failed] = self.judge.answer([different[i] for i in failed], 1)
        place = {question: i for i, question in enumerate(different)}
        return found[[place[question] for question in questions]]

    def _asked(
        self,
        task: str,
        pairs: Sequence[Pair],
        texts: Mapping[int, str],
        shown: Mapping[int, LatentWindows],
    ) -> dict[Pair, Yes]:
        """Return the judge's answers, for each latent and explanation."""
        questions = [
            Question(
                TASKS[task].format(texts[explained]),
                text_of(self.found, window, marked=task == "fuzzing"),
            )
            for latent, explained in pairs
            for window in shown[latent].score
        ]
        yes = iter(self._options(questions)[:, 0])
        return {pair: np.array([next(yes) for _ in shown[pair[0]].score]) for pair in pairs}

    def _by_rules(
        self,
        task: str,
        pairs: Sequence[Pair],
        at: Mapping[int, np.ndarray],
        shown: Mapping[int, LatentWindows],
    ) -> dict[Pair, Yes]:
        """Return what the rules predict for the same windows.

        They fire in a window if a rule holds in it; they agree with marks by the share of marked
        tokens at which one holds, and say yes from more than half of them. `at` is what each
        latent's rules predict at every token of the score text.
        """
        found = {}
        for latent, explained in pairs:
            predicted, windows = at[explained], shown[latent].score
            spans = [predicted[w.start - self.first :][: w.length] for w in windows]
            if task == "detection":
                highest = max(float(predicted.max(initial=0.0)), 1e-12)
                peaks = [float(span.max()) for span in spans]
                yes = [0.5 + peak / highest / 2 if peak else 0.0 for peak in peaks]
            else:
                yes = [
                    float((span[list(w.marks)] > 0).mean())
                    for span, w in zip(spans, windows, strict=True)
                ]
            found[latent, explained] = np.array(yes)
        return found

    def _intruders(self, shown: Mapping[int, LatentWindows]) -> dict[int, dict[str, Any]]:
        """Return the share of intruders that the judge finds; chance 0.2."""
        questions, places = [], []
        for latent, seen in shown.items():
            draws = np.random.default_rng([self.seed, 3, latent])
            for trial, place in trials(seen.score, ASKED, draws):
                texts = [text_of(self.found, seen.score[i], marked=True) for i in trial]
                numbered = [f"{i}:\n{text}" for i, text in enumerate(texts, 1)]
                options = tuple(str(i) for i in range(1, len(trial) + 1))
                questions.append(Question(INTRUDER_TASK, "\n\n".join(numbered), options))
                places.append(place)
        answers = self._options(questions)
        right = np.where(np.isnan(answers).any(1), np.nan, answers.argmax(1) == np.array(places))
        return {
            latent: {"found": mean_of_known(part), "failed": int(np.isnan(part).sum())}
            for latent, part in zip(shown, right.reshape(-1, ASKED), strict=True)
        }


def _verdicts(seen: LatentWindows, own: Yes, null: Yes) -> dict[str, Any]:
    return {
        "own": verdict(own, seen.score, seen.rate),
        "null": verdict(null, seen.score, seen.rate),
        "yes": [None if np.isnan(p) else round(p, 4) for p in own.tolist()],
    }


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
        items.append((words[n], text, True))
        if absent := [word for word in words if word not in text]:
            items.append((absent[n % len(absent)], text, False))
    return [
        (Question(DETECT_TASK.format(f"the word {word}"), text), true)
        for word, text, true in items
    ]


# ---- files --------------------------------------------------------------------------------


def judge_run(
    found: Interpretation,
    judge: Judge,
    protocol: Protocol,
    count: int,
    seed: int,
    report: Callable[[str], object],
) -> dict[str, Any]:
    """Return and write explanations and scores of `count` latents of every SAE.

    Rules must have explained them before. `report` prints a line.

    Raises:
        UserError: the judge cannot be reached, or none of its explanations can be read.
    """
    key = Ledger.key(FORMAT, found.head["key"], judge.identity, protocol, count, seed)
    file = found.folder / "judged" / f"{judge.identity['kind']}-{key[:12]}.json"
    stored = read_json(file) or {
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
            rows = {row["latent"]: row for row in found.explanations[name]["latents"]}
            stored["saes"][name] = judging.sae(sae, count, rows)
            write_json(file, stored)
    return stored


def planned(protocol: Protocol, latents: int) -> tuple[int, int, int]:
    """Return how many requests so many latents need, at most, and tokens to read and to write."""
    asked = 2 * len(TASKS) * protocol.scored  # by its own explanation and the null
    read = protocol.explain * DECILES * WINDOW + asked * (WINDOW + FRAME)
    read += ASKED * (5 * WINDOW + FRAME)
    questions = latents * (1 + asked + ASKED) + PLANTED
    return (questions, latents * read + PLANTED * (WINDOW + FRAME), questions + 40 * latents)
