"""Explanations and scores by a judge, on planted latents: latent i fires on word i."""

import io
import json
import os
import re
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from groupsae.app.console import print_judged
from groupsae.interpretation.explain import Explainer, explain_sae
from groupsae.interpretation.judge_scores import auc, verdict
from groupsae.interpretation.judge_windows import (
    DELPHI,
    NEIGHBOUR,
    POSITIVE,
    RANDOM,
    SAME_TOKEN,
    Protocol,
    Window,
    WindowChooser,
    text_of,
)
from groupsae.interpretation.judges import Endpoint, Ledger, Local
from groupsae.interpretation.judging import Judging, judge_run, planned
from groupsae.interpretation.page import labels_of
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from tests.helpers.chat_server import ChatServer
from tests.helpers.planted_latents import CONTEXT, LATENTS, WORDS, plant

OURS = Protocol()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted") / "interpretation")


@pytest.fixture(scope="module")
def by_rules(found):
    explainer = Explainer(found)
    explained, _ = explain_sae(
        found, "g", LATENTS, lambda parts: [explainer.explain("g", part) for part in parts]
    )
    return {"g": explained}


@pytest.fixture
def fresh(tmp_path):
    return plant(tmp_path / "interpretation")


@pytest.fixture(scope="module")
def windows(found):
    chooser = WindowChooser(found, found.saes["g"], OURS)
    return {latent: chooser.of(latent) for latent in range(LATENTS)}


def knows(prompt: str, body: object = None) -> str:
    """Answer as one who reads: the commonest marked word explains, and is looked for."""
    if prompt.startswith("One unit"):
        marked = Counter(re.findall(r"«\s*(\w+)", prompt))
        return f"Well.\nEXPLANATION: the word {marked.most_common(1)[0][0]}"
    text = prompt.split("Text:\n")[1].rsplit("\n\nAnswer", 1)[0]
    if prompt.startswith("In four"):
        marks = [re.findall(r"«\s*(\w+)", part) for part in text.split("\n\n")]
        common = Counter(word for part in marks for word in set(part)).most_common(1)[0][0]
        return str(next(i for i, part in enumerate(marks, 1) if common not in part))
    word = re.search(r'fires on: "the word (\w+)"', prompt)[1]
    if "between « and »" in prompt:
        return "yes" if re.search(rf"«\s*{word}\b", text) else "no"
    return "yes" if re.search(rf"\b{word}\b", text) else "no"


def endpoint(server, found, **options) -> Endpoint:
    ledger = Ledger(found.folder / "judged" / "answers.jsonl")
    return Endpoint(ledger, print, url=server.url, **{"model": "m", "parallel": 4, **options})


def judged_by(answer, found, by_rules, protocol=OURS, count=LATENTS, **options):
    lines = []
    with ChatServer(answer) as server:
        judge = endpoint(server, found, **options)
        found.explanations = by_rules
        result = judge_run(found, judge, protocol, count, 0, lines.append)
    return result, lines, server


# ---- windows ------------------------------------------------------------------------------


def test_windows_are_of_the_kinds_that_the_protocol_wants(found, windows):
    tokens, half = found.tokens, found.num_tokens[0]
    for latent, shown in windows.items():
        kinds = Counter(window.kind for window in shown.score)
        assert kinds == {POSITIVE: 40, RANDOM: 25, NEIGHBOUR: 10}  # the word is never silent
        assert len(shown.explain) == 20
        assert Counter(w.group for w in shown.score if w.kind == POSITIVE) == dict.fromkeys(
            range(10), 4
        )
        assert all(window.start + window.length <= half for window in shown.explain)
        assert all(window.start >= half for window in shown.score)
        where = np.flatnonzero(tokens[half:] == latent + 1) + half
        assert shown.fired == len(where)
        grid = {(p // CONTEXT, p % CONTEXT // 32) for p in where.tolist()}
        assert shown.rate == len(grid) / (half // 32)
        for window in shown.score:
            inside = tokens[window.start : window.start + window.length]
            assert 0 not in inside[:-1]  # one document
            assert window.start // CONTEXT == (window.start + window.length - 1) // CONTEXT
            fires = np.flatnonzero(inside == latent + 1)
            if window.kind == POSITIVE:
                assert window.marks == tuple(fires)
                assert tokens[window.peak] == latent + 1
            else:
                assert not len(fires)
                assert max(window.marks) < window.length
            if window.kind == NEIGHBOUR:
                assert tokens[window.peak] == (latent + 1 + window.group) % LATENTS + 1


def test_no_document_has_more_than_two_windows_of_a_side_and_no_context_is_on_both(found, windows):
    for shown in windows.values():
        for chosen in (shown.explain, [w for w in shown.score if w.kind == POSITIVE]):
            documents = Counter(int(found.documents[window.peak]) for window in chosen)
            assert max(documents.values()) <= 2
        explained = {found.documents[w.peak] for w in shown.explain}
        assert not explained & {found.documents[w.peak] for w in shown.score}


def test_score_windows_whose_context_was_explained_are_dropped(fresh):
    half = fresh.num_tokens[0]
    tokens = fresh.tokens.copy()
    tokens[half:] = tokens[:half]  # the score text repeats the other one
    np.save(fresh.folder / "collected" / "tokens.npy", tokens.reshape(-1, CONTEXT))
    for layer in (0, 1):
        file = fresh.folder / "collected" / "g" / f"layer.{layer}.npy"
        rows = np.load(file)
        first = rows[rows["position"] < half]
        again = first.copy()
        again["position"] += half
        both = np.concatenate([first, again])
        np.save(file, both[np.lexsort((both["position"], both["latent"]))])
    found = type(fresh)(fresh.folder)
    chooser = WindowChooser(found, found.saes["g"], OURS)
    shown = chooser.of(3)
    assert shown.dropped >= 20

    def before(window):
        start = max(int(found.bounds[0][window.peak]), window.peak - 7)
        return tuple(found.tokens[start : window.peak + 1])

    assert not {before(w) for w in shown.explain} & {before(w) for w in shown.score}


def test_number_and_place_of_marks_do_not_betray_what_fires(windows):
    counts, places, fires = [], [], []
    for shown in windows.values():
        for window in shown.score:
            counts.append(len(window.marks))
            places.append(np.mean(window.marks))
            fires.append(window.kind == POSITIVE)
    fires = np.array(fires)
    for values in (np.array(counts, float), np.array(places)):
        assert auc(values[fires], values[~fires]) == pytest.approx(0.5, abs=0.03)


def test_the_marks_of_a_run_are_joined_in_the_text(found):
    window = Window(RANDOM, 0, 0, 6, (1, 2, 4))
    words = found.text(0, 6)
    expected = f"{words[0]}«{words[1]}{words[2]}»{words[3]}«{words[4]}»{words[5]}"
    assert text_of(found, window, marked=True) == expected
    assert text_of(found, window, marked=False) == "".join(words)


def test_silent_windows_with_the_same_token(fresh):
    for layer in (0, 1):  # it fires on every other occurrence only
        file = fresh.folder / "collected" / "g" / f"layer.{layer}.npy"
        np.save(file, np.load(file)[::2])
    shown = WindowChooser(fresh, fresh.saes["g"], OURS).of(2)
    same = [w for w in shown.score if w.kind == SAME_TOKEN]
    assert len(same) == 15
    assert all(fresh.tokens[w.peak] == 3 for w in same)


def test_delphis_windows_come_from_one_list_and_overlap(found):
    chooser = WindowChooser(found, found.saes["g"], DELPHI)
    shares = []
    for latent in range(LATENTS):
        shown = chooser.of(latent)
        assert Counter(window.kind for window in shown.score) == {POSITIVE: 50, RANDOM: 50}
        assert len(shown.explain) == 40
        assert all(window.start < found.num_tokens[0] for window in shown.score)
        shares.append(shown.overlap)
    assert 0.1 < np.mean(shares) < 0.5


# ---- scores -------------------------------------------------------------------------------


def test_more_predictions_lower_the_headline_and_leave_balanced_accuracy():
    windows = [Window(POSITIVE, 0, 0, 1, (0,), i % 10) for i in range(400)]
    windows += [Window(RANDOM, 0, 0, 1, (0,)) for _ in range(1000)]
    few = np.array([1.0] * 320 + [0.0] * 80 + [1.0] * 8 + [0.0] * 992)
    twice = np.array([1.0] * 320 + [0.0] * 80 + [1.0] * 24 + [0.0] * 976)
    rate = 0.01  # 0.8 % and 0.8 % of all windows predicted; then twice as many
    one, two = verdict(few, windows, rate), verdict(twice, windows, rate)
    assert one["precision"] == pytest.approx(0.008 / (0.008 + 0.99 * 0.008))
    assert two["f1"] < one["f1"] - 0.2
    assert one["balanced_accuracy"] - two["balanced_accuracy"] < 0.01


def test_failures_are_counted_and_bounded():
    windows = [Window(POSITIVE, 0, 0, 1, (0,), 0)] * 4 + [Window(RANDOM, 0, 0, 1, (0,))] * 4
    yes = np.array([1, 1, 0, np.nan, 0, 0, np.nan, np.nan])
    found = verdict(yes, windows, 0.1)
    assert (found["windows"], found["failed"]) == (8, 3)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["worst"] == pytest.approx((2 / 4 + 1 - 2 / 4) / 2)
    assert found["best"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["tpr_by_decile"] == [pytest.approx(2 / 3)] + [None] * 9


def test_auc_is_the_chance_of_a_higher_value():
    draws = np.random.default_rng(0)
    one, other = draws.integers(0, 5, 30) / 4, draws.integers(0, 5, 20) / 4
    pairs = [(a > b) + (a == b) / 2 for a in one for b in other]
    assert auc(one, other) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(np.array([np.nan]), other))


# ---- the complete protocol ---------------------------------------------------------------


def test_a_judge_that_reads_scores_planted_latents_as_perfect(fresh, by_rules):
    result, lines, server = judged_by(knows, fresh, by_rules)
    assert result["qualification"] == {"items": 40, "failed": 0, "auc": 1.0, "qualified": True}
    assert not lines
    sae = result["saes"]["g"]
    assert [row["explanation"] for row in sorted(sae["latents"], key=lambda r: r["latent"])] == [
        f"the word {word}" for word in WORDS[:LATENTS]
    ]
    for by in ("judge", "rules"):
        for task, mean in sae["mean"][by].items():
            assert mean["f1"]["mean"] == 1.0, (by, task)
            assert mean["f1"]["interval"] == {"value": 1.0, "low": 1.0, "high": 1.0}
            assert mean["f1"]["adjusted"] == 1.0
            assert mean["balanced_accuracy"]["null"] < 0.62
            assert (mean["latents"], mean["failed"]) == (LATENTS, 0)
    assert sae["intruder"] == 1.0
    assert sae["discrimination"] == 1.0
    assert sae["overlap"] == 0.0
    assert server.repeated == 0
    # the page and the table show it
    label = labels_of(fresh)["g", 2].judged[0]
    assert label[:2] == ("endpoint m", "the word gamma")
    assert label[2].startswith("detection F1 1.00 (null 0.")
    console = Console(width=80, record=True, file=io.StringIO())
    print_judged(console, result)
    printed = console.export_text()
    assert "…" not in printed
    assert re.search(r"g \(8\)\s+endpoint\s+detection\s+1\.00 ±0\.00", printed)


def test_a_judge_that_remembers_the_windows_to_explain_scores_the_null(fresh, by_rules):
    remembered: dict[str, set[str]] = {}

    def remembers(prompt, body):
        if prompt.startswith("One unit"):
            name = f"number {len(remembered)}"
            clean = prompt.replace("«", "").replace("»", "").split()
            remembered[name] = {" ".join(clean[i : i + 8]) for i in range(len(clean))}
            return f"EXPLANATION: {name}"
        if 'on: "number' not in prompt:
            return knows(prompt)
        name = re.search(r'fires on: "(number \d+)"', prompt)[1]
        text = prompt.split("Text:\n")[1].rsplit("\n\nAnswer", 1)[0]
        clean = text.replace("«", "").replace("»", "").split()
        spans = {" ".join(clean[i : i + 8]) for i in range(len(clean))}
        return "yes" if spans & remembered[name] else "no"

    ours, _, _ = judged_by(remembers, fresh, by_rules, count=4)
    remembered.clear()
    delphi, _, _ = judged_by(remembers, fresh, by_rules, DELPHI, 4, model="n")
    for task in ("detection", "fuzzing"):
        mean = ours["saes"]["g"]["mean"]["judge"][task]["balanced_accuracy"]
        assert mean["mean"] == pytest.approx(mean["null"], abs=0.02)
        # what explaining and scoring on one list gives away
        leaky = delphi["saes"]["g"]["mean"]["judge"][task]["balanced_accuracy"]
        assert leaky["mean"] > leaky["null"] + 0.05
    assert delphi["saes"]["g"]["overlap"] > 0.1


def test_answers_that_cannot_be_parsed_get_one_more_attempt_and_are_counted(fresh, by_rules):
    def sometimes(prompt, body):
        if "«" in prompt and not prompt.startswith(("One unit", "In four")):
            if "river" in prompt:  # never
                return "perhaps"
            if "stone" in prompt and body["seed"] == 0:  # at the second attempt
                return "perhaps"
        return knows(prompt)

    with ChatServer(sometimes) as server:
        judge = endpoint(server, fresh)
        fresh.explanations = by_rules
        result = judge_run(fresh, judge, OURS, 3, 0, print)
    mean = result["saes"]["g"]["mean"]["judge"]
    assert mean["detection"]["failed"] == 0
    fuzzed = [
        text_of(fresh, Window(**{**w, "marks": tuple(w["marks"])}), marked=True)
        for row in result["saes"]["g"]["latents"]
        for w in row["windows"]
    ]
    assert mean["fuzzing"]["failed"] == sum("river" in text for text in fuzzed) > 0
    assert mean["fuzzing"]["f1"]["mean"] == 1.0  # of those that were answered
    assert mean["fuzzing"]["worst"]["mean"] < 0.9 < mean["fuzzing"]["best"]["mean"]


def test_no_explanation_that_can_be_read_is_one_sentence_and_answers_are_kept(fresh, by_rules):
    def silent(prompt, body):
        return "I would rather not." if prompt.startswith("One unit") else knows(prompt)

    with pytest.raises(UserError, match="no explanation could be read from the answers of endp"):
        judged_by(silent, fresh, by_rules)
    assert len(Ledger(fresh.folder / "judged" / "answers.jsonl")) == 40 + 2 * LATENTS


def test_a_judge_that_cannot_read_is_not_qualified_and_gets_no_headline(fresh, by_rules):
    def guesses(prompt, body):
        if prompt.startswith(("One unit", "In four")):
            return knows(prompt)
        return "yes" if hash(prompt) % 2 else "no"

    result, lines, _ = judged_by(guesses, fresh, by_rules, count=2)
    assert not result["qualification"]["qualified"]
    assert "is not qualified" in lines[0]
    console = Console(width=80, record=True, file=io.StringIO())
    print_judged(console, result)
    printed = console.export_text()
    assert "(not qualified)" in printed
    assert re.search(r"endpoint\s+detection\s+-\s+-\s+-\s+-", printed)
    assert "judge is not qualified" in labels_of(fresh)["g", 0].judged[0][2]


def test_the_bundled_model_is_not_qualified(fresh, by_rules):
    judge = Local(
        Ledger(fresh.folder / "judged" / "answers.jsonl"),
        FrozenLM(name="tiny"),
        torch.device("cpu"),
    )
    assert not Judging(fresh, judge, OURS).qualification()["qualified"]


def test_a_killed_judge_continues_and_pays_for_nothing_twice(fresh, by_rules):
    fresh.explanations = by_rules
    with ChatServer(knows, stay=0.005) as server:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with the server's threads
            child = os.fork()
        if child == 0:
            judge_run(fresh, endpoint(server, fresh, parallel=2), OURS, 2, 0, print)
            os._exit(0)
        while len(server.bodies) < 200:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        paid = len(server.bodies)
        judge = endpoint(server, fresh, parallel=2)
        result = judge_run(fresh, judge, OURS, 2, 0, print)
        assert server.repeated <= 4  # requests that were on their way
        assert len(server.bodies) - paid > 200
    untouched = plant(Path(fresh.folder.parent) / "other" / "interpretation")
    again, _, _ = judged_by(knows, untouched, by_rules, count=2)
    assert json.dumps(result["saes"]) == json.dumps(again["saes"])


def test_a_single_latent_has_no_null_and_no_latent_no_scores(fresh, by_rules, tmp_path):
    result, _, _ = judged_by(knows, fresh, by_rules, count=1)
    mean = result["saes"]["g"]["mean"]["judge"]["detection"]["f1"]
    assert (mean["mean"], mean["null"]) == (1.0, None)
    assert "adjusted" not in mean
    one = {"g": {"latents": by_rules["g"]["latents"][:1]}}  # rules explained fewer
    assert len(judged_by(knows, fresh, one, model="n")[0]["saes"]["g"]["latents"]) == 1
    small = plant(tmp_path / "small" / "interpretation", blocks=8)
    found, _, _ = judged_by(knows, small, by_rules)
    assert found["saes"]["g"]["latents"] == []
    console = Console(width=80, record=True, file=io.StringIO())
    print_judged(console, found)
    assert re.search(r"g \(0\)\s+endpoint\s+detection\s+–", console.export_text())


def test_needs_are_those_of_the_requests_that_follow(fresh, by_rules):
    requests, tokens, _ = planned(OURS, 4)
    _, _, server = judged_by(knows, fresh, by_rules, count=4)
    # some of the questions are the same, and these latents have no windows with the same token
    assert len(server.bodies) <= requests <= 1.3 * len(server.bodies)
    assert server.repeated == 0
    read = sum(len(body["messages"][0]["content"]) for body in server.bodies) / 4
    assert read <= tokens <= 1.6 * read  # real explanations are longer than these
