"""Probes: exact labels, which examples are drawn, the fits, their AUC, and the part itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groupsae.data.filters import TokenFilter
from groupsae.data.sources import Document
from groupsae.evaluation import probes
from groupsae.evaluation.examples import (
    Examples,
    Reader,
    Task,
    files_of,
    python_examples,
    table_examples,
)
from groupsae.evaluation.labels import CONCEPTS, python_labels
from groupsae.evaluation.parts import Subject
from groupsae.evaluation.probes import (
    Probes,
    Probing,
    activations,
    auc,
    class_differences,
    fit_probe,
    latents,
)
from groupsae.grouping.groupings import Grouping
from groupsae.runtime.errors import UserError
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite
from tests.helpers.lms import frozen

BOOTSTRAP = {"resamples": 50, "level": 0.9, "seed": 0}
SOURCE = '''"""Docs."""
import os.path as p, re  # why
from a import b

class Café:
    """More."""
    def área(self, größe: int = 3, *rest, key=b"x"):
        é = self.naïve.call(größe)(1.5, f"{p}!")
        return é  # ende
'''


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_probe_whose_examples_training_left_out_is_refused() -> None:
    numbers = np.arange(8)
    task = Task("long: yes", numbers, numbers % 2 == 0)
    examples = Examples([[1, 2]] * 8, numbers, numbers * 0, numbers, numbers >= 4, [task])
    probing = Probing(examples, [1], BOOTSTRAP)
    x = np.random.default_rng(0).random((8, 3))
    assert len(list(probing.scored("all", 0, x, numbers >= 0))) == 1
    with pytest.raises(UserError, match=r"long: yes has too few examples at layer 3"):
        list(probing.scored("all", 3, x, numbers >= 4))


# ---- labels -----------------------------------------------------------------------------------


def words(text: str, covered: np.ndarray) -> list[str]:
    """Return the runs of covered characters."""
    edges = np.flatnonzero(np.diff([0, *covered.astype(int), 0]))
    return [text[a:b] for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_labels_of_a_file_are_exact_also_after_letters_of_several_bytes(line_end: str) -> None:
    text = SOURCE.replace("\n", line_end)
    labels = python_labels(text)
    assert labels is not None
    assert list(labels) == list(CONCEPTS)
    found = {name: words(text, labels[name]) for name in CONCEPTS}
    assert found["comment"] == ["# why", "# ende"]
    assert found["docstring"] == ['"""Docs."""', '"""More."""']
    assert found["string"] == ['"""Docs."""', '"""More."""', 'b"x"', 'f"{p}!"']
    assert found["number"] == ["3", "1.5"]
    assert found["keyword"] == ["import", "as", "from", "import", "class", "def", "return"]
    assert found["function_name"] == ["área"]
    assert found["parameter"] == ["self", "größe", "rest", "key"]
    assert found["attribute"] == ["naïve", "call"]
    assert found["called"] == ["call"]
    assert found["imported"] == ["os.path as p", "re", "b"]
    nested = labels["nested"]
    assert nested[text.index("self.naïve")]
    assert not nested[text.index("área")]


@pytest.mark.parametrize("text", ["def f(:\n", "x = '''\n", "if x:\npass\n", "\0"])
def test_a_file_with_errors_has_no_labels(text: str) -> None:
    assert python_labels(text) is None


# ---- examples ---------------------------------------------------------------------------------


def python_files(count: int) -> list[Document]:
    return [
        Document(f"{n}.py", f"# file {n}\nimport m{n}\ndef f{n}(x, y):\n    return x.z({n})\n")
        for n in range(count)
    ]


def test_tokens_are_drawn_evenly_and_are_what_their_labels_are_of(tiny_lm: Path) -> None:
    tokenizer = frozen(tiny_lm).tokenizer()
    files = python_files(20)
    found = python_examples([files[:10], files[10:]], Reader(tokenizer, 16, [1], 12, 0))
    assert {task.name for task in found.tasks} >= {"comment", "parameter", "called", "imported"}
    assert all(window[0] == 1 and len(window) <= 16 for window in found.windows)
    for task in found.tasks:
        test = found.test[task.rows]
        for half in (test, ~test):
            assert task.positive[half].mean() == 0.5
            assert len(task.positive[half]) <= 24
    assert not set(found.document[found.test]) & set(found.document[~found.test])
    task = next(task for task in found.tasks if task.name == "keyword")
    rows = task.rows[task.positive]
    shown = {tokenizer.decode(found.windows[found.window[r]][found.position[r]]) for r in rows}
    assert all(piece.strip() in "import def return" for piece in shown), shown


def test_too_few_files_are_refused(tiny_lm: Path) -> None:
    files = python_files(9)
    with pytest.raises(UserError, match="at least 8 files to fit them on and 8 to test"):
        python_examples([files[:2], files[2:]], Reader(frozen(tiny_lm).tokenizer(), 16, [], 12, 0))


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_table_is_read_alike_as_csv_and_jsonl_and_split_by_document(
    tmp_path: Path, tiny_lm: Path
) -> None:
    rows = [{"text": f"text {n}", "label": "abc"[n % 3], "document": n // 4} for n in range(48)]
    rows += [rows[0], {"text": "", "label": "a", "document": 1}]
    first = table(tmp_path / "mine.jsonl", rows)
    second = tmp_path / "mine.csv"
    lines = [",".join(str(row[key]) for key in row) for row in rows]
    second.write_text("text,label,document\n" + "\n".join(lines))
    tokenizer = frozen(tiny_lm).tokenizer()
    ours, theirs = (
        table_examples(file, Reader(tokenizer, 16, [], 99, 0)) for file in (first, second)
    )
    assert ours.windows == theirs.windows
    assert [task.name for task in ours.tasks] == ["mine: a", "mine: b", "mine: c"]
    for one, other in zip(ours.tasks, theirs.tasks, strict=True):
        assert (one.rows == other.rows).all()
        assert (one.positive == other.positive).all()
    assert not set(ours.document[ours.test]) & set(ours.document[~ours.test])
    last = [len(ours.windows[window]) - 1 for window in ours.window]
    assert ours.position.tolist() == last
    two = table(tmp_path / "two.jsonl", rows[0:48:3] + rows[1:48:3])
    assert [t.name for t in table_examples(two, Reader(tokenizer, 16, [], 99, 0)).tasks] == [
        "two: b"
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"txt": "a", "label": 1}],
            r"needs the columns text .* and label .*; it has: txt, label",
        ),
        ([{"text": str(n), "label": "x"} for n in range(9)], r"1 different labels \(x\)"),
        ([{"text": str(n), "label": n} for n in range(30)], "30 different labels"),
        ([{"text": str(n), "label": n == 0} for n in range(9)], "has 1 texts with the label True"),
    ],
)
def test_a_table_that_no_probe_can_use_is_refused(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, tiny_lm: Path
) -> None:
    file = table(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match=message):
        table_examples(file, Reader(frozen(tiny_lm).tokenizer(), 16, [], 9, 0))


def test_damaged_and_missing_files_are_one_sentence(
    tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": \n')
    with pytest.raises(UserError, match=r"t.jsonl cannot be read as .jsonl"):
        table_examples(tmp_path / "t.jsonl", Reader(frozen(tiny_lm).tokenizer(), 16, [], 9, 0))
    with pytest.raises(UserError, match="labels=nowhere.csv: there is no such file"):
        files_of(["nowhere.csv"])
    data = tmp_path / "sae_probes" / "data" / "cleaned_data"
    data.mkdir(parents=True)
    (tmp_path / "sae_probes" / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("5_hist", "161_agnews_0"):
        (data / f"{name}.csv.zst").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert [file.name for file in files_of(["sae_probes"])] == [
        "161_agnews_0.csv.zst", "5_hist.csv.zst",
    ]  # fmt: skip
    with pytest.raises(UserError, match="sae-probes has no agnews; the nearest are 161_agnews_0"):
        files_of(["sae_probes/agnews"])


# ---- fits -------------------------------------------------------------------------------------


def test_the_auc_counts_pairs_and_resampled_documents(rng: np.random.Generator) -> None:
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    owner = rng.integers(0, 5, 60)
    pairs = scores[positive][:, None] - scores[~positive]
    naive = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert auc(scores, positive)[0] == pytest.approx(naive, abs=1e-12)
    weights = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 0, 2], [0, 0, 0, 0, 0]], dtype=float)
    found = auc(scores, positive, owner, weights)
    again = np.repeat(np.arange(60), weights[1][owner].astype(int))
    assert found[0] == pytest.approx(naive, abs=1e-12)
    assert found[1] == pytest.approx(auc(scores[again], positive[again])[0], abs=1e-12)
    assert np.isnan(found[2])


def test_class_differences_are_differences_of_means(rng: np.random.Generator) -> None:
    from scipy import sparse

    x = rng.random((30, 5)) * (rng.random((30, 5)) < 0.5)
    rows, positive = np.arange(3, 27), rng.random(24) < 0.5
    naive = x[rows[positive]].mean(0) - x[rows[~positive]].mean(0)
    for each in (x, sparse.csr_matrix(x)):
        found = class_differences(each, [Task("t", rows, positive)])
        assert np.allclose(found[:, 0], naive, atol=1e-12)


def test_a_probe_is_scikit_learns_with_the_best_c(rng: np.random.Generator) -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.preprocessing import StandardScaler

    x, document = rng.normal(size=(120, 3)) * [1, 10, 100], rng.integers(0, 9, 120)
    positive = x @ [1, 0.1, 0] + rng.normal(size=120) > 0
    scaled = StandardScaler().fit_transform(x)
    folds = list(GroupKFold(3).split(scaled, positive, document))
    means = [
        cross_val_score(
            LogisticRegression(C=c), scaled, positive, cv=folds, scoring="roc_auc"
        ).mean()
        for c in probes.CS
    ]
    best = LogisticRegression(C=probes.CS[int(np.argmax(means))], max_iter=1000)
    wanted = best.fit(scaled, positive).decision_function(scaled)
    found = fit_probe(x, positive, document)(x)
    assert np.allclose(found, wanted, atol=1e-6)
    assert auc(found, positive)[0] == pytest.approx(roc_auc_score(positive, found), abs=1e-12)


# ---- the part ---------------------------------------------------------------------------------


@pytest.fixture
def subject(tiny_lm: Path) -> Subject:
    """Two SAEs on each of two layers: one of their own, and one that they share."""
    lm = frozen(tiny_lm)
    model = lm.load_with_head(torch.device("cpu"))

    def suite(name: str, layers: list[int], seed: int) -> Suite:
        sae = TopK(d_model=32, d_sae=64, k=4, generator=torch.Generator().manual_seed(seed))
        factors = {str(layer): 0.5 + layer for layer in layers}
        config = {"layers": layers, "norm_factors": factors, "context": 16, "stream": {}}
        return Suite({name: sae}, {name: config})

    saes = {"layer.0": suite("layer.0", [0], 0), "layer.1": suite("layer.1", [1], 1)}
    saes |= {"layers.0-1": suite("layers.0-1", [0, 1], 2), "same": suite("same", [0], 0)}
    ways = [
        Grouping("complete-1", "groups", 1, None, dict.fromkeys((0, 1), "layers.0-1"), [0, 1]),
        Grouping("per_layer", "per_layer", 2, None, {0: "layer.0", 1: "layer.1"}, [0, 1]),
        Grouping("again", "groups", 2, None, {0: "same", 1: "layer.1"}, [0, 1]),
    ]
    return Subject(saes=saes, groupings=ways, lm=model, tokenizer=lm.tokenizer)


def questions(path: Path) -> Path:
    endings = {"yes": "(", "no": "self"}
    return table(
        path,
        [
            {"text": f"{'x ' * (n % 7)}f{n} {endings[label]}", "label": label}
            for n, label in enumerate(["yes", "no"] * 40)
        ],
    )


def measured(subject: Subject, file: Path, **changes: Any) -> dict[str, Any]:
    pytest.importorskip("sklearn")
    values = {
        "labels": [str(file)],
        "k": [1, 4],
        "examples": 30,
        "seed": 0,
        "bootstrap": BOOTSTRAP,
    }
    return Probes(**(values | changes)).measure(subject)


def test_every_pair_has_a_probe_and_means_are_means_of_them(
    subject: Subject, tmp_path: Path
) -> None:
    found = measured(subject, questions(tmp_path / "q.jsonl"))
    probed = {(row["features"], row["layer"], row["k"]): row for row in found["probes"]}
    names = [("layer.0", 0), ("same", 0), ("layer.1", 1), ("layers.0-1", 0), ("layers.0-1", 1)]
    names += [("channels", 0), ("channels", 1)]
    residual = [("residual", 0, None), ("residual", 1, None)]
    assert set(probed) == {*((*name, k) for name in names for k in (1, 4)), *residual}
    assert all(probed[key]["auc"]["value"] == 1.0 for key in residual)  # the last token decides
    rows = {row["grouping"]: row for row in found["groupings"]}
    mean = np.mean([probed["layers.0-1", layer, 4]["auc"]["value"] for layer in (0, 1)])
    assert rows["complete-1"]["auc_4"]["value"] == pytest.approx(mean, abs=1e-12)
    own = np.mean([probed[f"layer.{layer}", layer, 4]["auc"]["value"] for layer in (0, 1)])
    assert rows["complete-1"]["auc_4_lost"]["value"] == pytest.approx(own - mean, abs=1e-12)
    assert rows["again"]["auc_4_lost"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "auc_4_lost" not in rows["per_layer"]
    assert rows["complete-1"]["auc_residual"] == rows["per_layer"]["auc_residual"]


def test_results_do_not_depend_on_batches_and_memory(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = questions(tmp_path / "q.jsonl")
    before = measured(subject, file)
    monkeypatch.setattr(probes, "FORWARD", 1)
    monkeypatch.setattr(probes, "MEMORY", 1)
    monkeypatch.setattr(probes, "PIECE", 7)
    after = measured(subject, file)
    for one, other in zip(before["groupings"], after["groupings"], strict=True):
        assert one.keys() == other.keys()
        assert one["auc_4"]["value"] == pytest.approx(other["auc_4"]["value"], abs=1e-6)


def test_activations_are_those_of_the_text_alone(subject: Subject) -> None:
    windows = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]
    examples = Examples(
        windows, np.array([0, 1, 2, 0]), np.array([3, 1, 0, 1]), np.zeros(4, int),
        np.zeros(4, bool), [],
    )  # fmt: skip
    filters = TokenFilter(torch.tensor([11]), 1, None)
    found = {layer: rest for layer, *rest in activations(subject.lm, examples, [0, 1], filters)}
    for layer, (acts, kept) in found.items():
        assert kept.tolist() == [True, True, False, True]
        for row, (window, at) in enumerate(zip(examples.window, examples.position, strict=True)):
            alone = subject.lm.acts(torch.tensor([windows[window]]), [layer])[layer][0, at]
            assert torch.allclose(acts[row], alone, atol=1e-5)
        suite = subject.saes["layers.0-1"]
        dense = suite.encode(acts, layer).numpy()
        assert np.array_equal(latents(suite, layer, acts).toarray(), dense)
