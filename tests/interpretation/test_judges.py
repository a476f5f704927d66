"""Judges against a server that misbehaves in every way, and a local model."""

import json

import numpy as np
import pytest
import torch

from groupsae.interpretation.judges import Endpoint, Ledger, Local, Question
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from tests.helpers.chat_server import ChatServer

KEY = "sk-this-must-not-be-seen-anywhere"
QUESTIONS = [Question("Is it even?", str(i)) for i in range(12)]


def says(prompt, body):
    return "yes" if int(prompt.split("Text:\n")[1].split("\n")[0]) % 2 == 0 else "no"


def endpoint(server, folder, lines=None, **options) -> Endpoint:
    lines = [] if lines is None else lines
    made = Endpoint(
        Ledger(folder / "answers.jsonl"), lines.append, url=server.url, model="m",
        **{"timeout": 0.7, "parallel": 1, **options},
    )  # fmt: skip
    made.waits = []
    made._pause = made.waits.append
    return made


def test_probabilities_come_from_the_first_token(tmp_path):
    with ChatServer(says) as server:
        found = endpoint(server, tmp_path).answer(QUESTIONS)
    share = np.exp(-0.1) / (np.exp(-0.1) + np.exp(-2.4))
    assert found[:, 0].tolist() == pytest.approx([share, 1 - share] * 6)
    assert {body["max_tokens"] for body in server.bodies} == {1}
    assert all(body["temperature"] == 0 and body["seed"] == 0 for body in server.bodies)


@pytest.mark.parametrize("form", ["{}", "**{}**.", "I think so: {}, as {} as can be"])
def test_without_probabilities_the_written_word_counts(tmp_path, form):
    with ChatServer(
        lambda *asked: form.replace("{}", says(*asked).title()), probabilities=False
    ) as server:
        found = endpoint(server, tmp_path).answer(QUESTIONS)
    assert found[:, 0].tolist() == [1.0, 0.0] * 6
    assert len(server.bodies) == 1 + len(QUESTIONS)  # a probe
    assert server.bodies[-1]["max_tokens"] == 300


@pytest.mark.parametrize("refused", [400, 422])
def test_a_server_that_refuses_logprobs_is_asked_without(tmp_path, refused):
    def answers(prompt, body):
        return "no" if "No, it is not." in prompt else says(prompt, body)

    def judged():
        judge = endpoint(server, tmp_path)
        judge.check()
        return judge.answer(QUESTIONS)[:, 0].tolist()

    with ChatServer(answers, [refused], probabilities=False) as server:
        assert judged() == [1.0, 0.0] * 6
    assert judged() == [1.0, 0.0] * 6  # all is known: it needs no server


FAULTS = ["malformed", "truncated", "empty", "no_choices", "slow", 408, 429, 500, 503]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_is_tried_again(tmp_path, fault):
    lines = []
    with ChatServer(says, [None, fault, fault]) as server:
        judge = endpoint(server, tmp_path, lines)
        assert not np.isnan(judge.answer(QUESTIONS)).any()
    # the server asks for 7 seconds with a 429
    assert judge.waits == ([7.0, 7.0] if fault == 429 else [1.0, 2.0])
    assert len(lines) == (2 if fault == 429 else 1)
    assert server.url in lines[0]


def test_replies_that_stay_useless_are_failures_and_not_answers(tmp_path):
    with ChatServer(says, [None, "malformed", "malformed"]) as server:
        found = endpoint(server, tmp_path, retries=1).answer(QUESTIONS[:3])
    # the first question was the probe
    assert np.isnan(found[1]).all()
    assert not np.isnan(found[[0, 2]]).any()
    assert len(Ledger(tmp_path / "answers.jsonl")) == 2


def test_answers_that_are_no_answers_are_failures(tmp_path):
    for probabilities in (True, False):
        for text in ("maybe", "yes or no")[: 1 if probabilities else 2]:
            with ChatServer(lambda *_, t=text: t, probabilities=probabilities) as server:
                judge = endpoint(server, tmp_path / f"{probabilities} {text}")
                assert np.isnan(judge.answer(QUESTIONS)).all()


def test_a_wrong_key_is_one_sentence_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    lines = []
    with ChatServer(says, key="another") as server:
        judge = endpoint(server, tmp_path, lines, key_variable="JUDGE_KEY")
        with pytest.raises(UserError, match=r"refuses access \(401\): check the key in the envir"):
            judge.answer(QUESTIONS)
    assert server.requests == 1
    assert server.authorizations == [f"Bearer {KEY}"]


def test_a_key_stays_out_of_files_messages_and_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    lines = []

    def echoes(prompt, body):
        return f"yes, and your key is {KEY}"

    with ChatServer(echoes, [500, 418], key=KEY) as server:
        judge = endpoint(server, tmp_path, lines, key_variable="JUDGE_KEY")
        with pytest.raises(UserError, match=r"\(418\)") as refused:
            judge.answer(QUESTIONS)
        judge.write(["hello"])
    assert KEY not in json.dumps(judge.identity) + repr(lines) + str(refused.value)
    assert KEY not in (tmp_path / "answers.jsonl").read_text()


def test_bad_options_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    ledger = Ledger(tmp_path / "answers.jsonl")

    def make(**options):
        Endpoint(ledger, print, **{"url": "http://127.0.0.1:9/v1", "model": "m", **options})

    with pytest.raises(UserError, match="JUDGE_KEY is not set"):
        make(key_variable="JUDGE_KEY")
    with pytest.raises(UserError, match="must be the name of an environment variable") as error:
        make(key_variable=KEY)
    assert KEY not in str(error.value)
    with pytest.raises(UserError, match="model has no default"):
        make(model=None)
    with pytest.raises(UserError, match="url is 'localhost:80': give an address"):
        make(url="localhost:80")


def test_a_server_that_is_down_is_one_sentence_and_answers_are_kept(tmp_path):
    with ChatServer(says) as server:
        endpoint(server, tmp_path).answer(QUESTIONS[:4])
    judge = endpoint(server, tmp_path, retries=2)
    assert not np.isnan(judge.answer(QUESTIONS[:4])).any()  # from the file
    with pytest.raises(UserError, match=r"does not answer \(ConnectError.*The 4 answers so far"):
        judge.answer(QUESTIONS)
    assert judge.waits == [1.0, 2.0]


@pytest.mark.parametrize("status", [None, 401])
def test_a_judge_is_tried_before_long_work(tmp_path, status):
    with ChatServer(lambda *_: "no", [] if status is None else [status]) as server:
        judge = endpoint(server, tmp_path, retries=0)
        if status is None:
            judge.check()
            assert judge._how["logprobs"]
            return
        with pytest.raises(UserError, match="refuses access"):
            judge.check()
    with pytest.raises(UserError, match="does not answer"):  # it is down
        endpoint(server, tmp_path, retries=0).check()


def test_nothing_is_paid_for_twice_and_a_truncated_line_is_asked_for_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    with ChatServer(says) as server:
        first = endpoint(server, tmp_path).answer(QUESTIONS)
        assert endpoint(server, tmp_path).answer(QUESTIONS).tolist() == first.tolist()
        assert len(server.bodies) == len(QUESTIONS)
        file.write_bytes(file.read_bytes()[:-20])
        assert endpoint(server, tmp_path).answer(QUESTIONS).tolist() == first.tolist()
        assert len(server.bodies) == len(QUESTIONS) + 1
    assert len(Ledger(file)) == len(QUESTIONS)


def test_a_cap_counts_earlier_starts(tmp_path):
    with ChatServer(says) as server:
        endpoint(server, tmp_path).answer(QUESTIONS[:3])  # 11 tokens each
        with pytest.raises(UserError, match="most_tokens allows: raise it to continue. The 4"):
            endpoint(server, tmp_path, most_tokens=44).answer(QUESTIONS)
    assert len(server.bodies) == 4


def test_keys_of_the_body_are_added_and_left_out(tmp_path):
    with ChatServer(says) as server:
        judge = endpoint(server, tmp_path, body={"seed": None, "top_p": 0.5})
        judge.answer(QUESTIONS[:1])
    assert "seed" not in server.bodies[0]
    assert server.bodies[0]["top_p"] == 0.5


def test_a_local_model_gives_the_shares_of_its_logits(tmp_path):
    lm = FrozenLM(name="tiny")
    judge = Local(Ledger(tmp_path / "answers.jsonl"), lm, torch.device("cpu"))
    questions = [Question("Is it?", "def f(x):" * n) for n in (1, 5, 3)]
    found = judge.answer(questions)
    model, tokenizer = judge.model, judge.tokenizer
    for question, row in zip(questions, found, strict=True):
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        firsts = [
            {
                tokenizer(form, add_special_tokens=False).input_ids[0]
                for form in (word, f" {word}", word.title(), f" {word.title()}")
            }
            for word in ("yes", "no")
        ]
        own = [sorted(firsts[0] - firsts[1]), sorted(firsts[1] - firsts[0])]
        yes, no = (logits[ids].exp().sum() for ids in own)
        assert row[0] == pytest.approx(float(yes / (yes + no)), rel=1e-4)
    again = Local(Ledger(tmp_path / "answers.jsonl"), lm, torch.device("cpu"))
    again.model = None  # all answers are known
    assert again.answer(questions).tolist() == found.tolist()
    assert judge.write(["def f(x):\nSay EXPLANATION:"])[0].startswith("Say EXPLANATION:")
    too_long = Question("Is it?", "word " * 300)
    assert np.isnan(judge.answer([too_long])).all()
