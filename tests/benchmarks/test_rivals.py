"""The pure parts of the comparison with other libraries; nothing here is timed."""

import sys
from pathlib import Path

import pytest
import torch

import groupsae
from benchmarks.rivals import lm
from benchmarks.rivals.__main__ import main, own_version, turns
from benchmarks.rivals.activations import SHAPES, batches, fingerprint
from benchmarks.rivals.contenders import BASE, PARTS, Contender, contenders, versions
from benchmarks.rivals.process import Worker
from benchmarks.rivals.results import write_page
from benchmarks.rivals.summary import side_by_side, summed_up
from tests.helpers.lms import frozen

# Three rounds; the base is twice, four times and three times as slow as the other in them.
BLOCKS = {
    BASE: [[0.2, 0.2, 9.0], [0.4, 0.4, 0.4], [0.3, 0.3, 0.0]],
    "ours": [[0.1, 0.1, 0.1], [0.1, 5.0, 0.1], [0.1, 0.0, 0.1]],
}


def test_a_row_is_the_median_of_block_medians_and_its_ratios_are_taken_round_by_round():
    rows = summed_up(BLOCKS, BASE)
    assert rows["ours"] == pytest.approx((100.0, 3.0, 2.0, 4.0))
    assert rows[BASE] == pytest.approx((300.0, 1.0, 1.0, 1.0))


def test_the_table_has_a_line_for_everyone_and_an_empty_cell_for_who_was_left_out():
    rows = summed_up(BLOCKS, BASE)
    lines = side_by_side(rows, {BASE: rows[BASE]}, "ms", 2048).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == f"| {BASE} | 300 | 1.00 [1.00, 1.00] | 300 | 1.00 [1.00, 1.00] |"
    assert lines[3] == "| ours | 100 | 3.00 [2.00, 4.00] |  |  |"
    rates = side_by_side(rows, {}, "tokens/s", 2048).splitlines()
    assert rates[3].startswith("| ours | 20,480 |")  # 2048 tokens in 0.1 s


def test_the_page_holds_every_part_that_was_measured_and_no_other(tmp_path: Path):
    measured = {
        part: {"blocks": BLOCKS, "conditions": f"as {part}"} for part in ("S1", "S1-tuned", "loop")
    }
    write_page(measured, tmp_path)
    page = (tmp_path / "rivals.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## The whole")]
    assert page.count("\n## A training step") == 1  # S2 was not measured
    assert all(f"{part}: as {part}" in page for part in measured)
    assert (tmp_path / "rivals.png").stat().st_size > 10_000


def test_everyone_is_compared_with_a_base_that_takes_part():
    for part in PARTS:
        names = [each.name for each in contenders(part, Path("lm"), [["sae.k=8"]])]
        assert BASE in names
        assert len(set(names)) == len(names)
        assert sum("sae.k=8" in name for name in names) == 1
    steps = contenders("S1", Path("lm"), [["model.dtype=bfloat16"]])  # of no effect there
    assert not any("bfloat16" in each.name for each in steps)


def test_the_loop_has_a_row_without_the_allocators_setting_unless_all_have_it():
    for part in ("S1", "S2", "loop"):
        rows = [c.arguments for c in contenders(part, Path("lm"), []) if "plain malloc" in c.name]
        assert [x.count("plain") for x in rows] == [1]
        tuned = contenders(f"{part}-tuned", Path("lm"), [])
        assert not any("plain" in x for c in tuned for x in [c.name, *c.arguments])


def test_every_round_begins_with_another_contender():
    found = ["".join(order) for order in turns("abc", 5)]
    assert found == ["abc", "bca", "cab", "abc", "bca"]


def test_the_conditions_name_the_commit(monkeypatch: pytest.MonkeyPatch):
    assert own_version().startswith(f"groupsae {groupsae.__version__}")
    monkeypatch.setenv("PATH", "")  # no git
    assert own_version() == f"groupsae {groupsae.__version__}"


def test_the_versions_are_those_that_the_requirement_files_pin():
    assert versions().keys() == {"saelens", "sparsify", "dictionary_learning"}
    assert all(len(version.split()) == 2 for version in versions().values())


def test_the_activations_are_a_function_of_the_shape(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SHAPES, "small", (32, 64, 4, 50))
    made = batches("small")
    assert {tuple(each.shape) for each in made} == {(50, 32)}
    assert fingerprint(made) == fingerprint(batches("small"))
    assert fingerprint(made) != fingerprint([2 * each for each in made])
    mean = torch.cat(made).mean(0)
    assert mean.norm() > 0.5  # a bias has something to learn


WORKER = """
import sys, time
sys.path.insert(0, {folder!r})
from gate import Gate
gate = Gate()
print("a library's chatter")
gate.ready(threads=1)
for step in range(5):
    gate()
    time.sleep(0.02 * (step + 1))
{end}
"""


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> Worker:
    folder = Path(__file__).parents[2] / "benchmarks" / "rivals"
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(folder), end=end))
    monkeypatch.setattr(Contender, "command", lambda _: [sys.executable, str(script)])
    return Worker(Contender("stub", "stub", []), tuned=False, log=tmp_path / "log")


def test_a_worker_trains_on_from_block_to_block_and_waits_in_between(tmp_path, monkeypatch):
    stub = worker(tmp_path, monkeypatch, "gate()")
    assert stub.facts() == {"threads": 1}
    first, second = stub.block(2), stub.block(3)
    stub.stop()
    # sleeps last at least what was asked for, so these hold on a busy machine
    assert [t >= 0.02 * (i + 1) for i, t in enumerate([*first, *second])] == [True] * 5
    assert (tmp_path / "log").read_text() == "a library's chatter\n"
    assert stub.process.returncode == 0


def test_a_worker_that_ends_is_reported_with_its_output(tmp_path, monkeypatch):
    stub = worker(tmp_path, monkeypatch, "raise ValueError('no such option')")
    stub.facts()
    with pytest.raises(SystemExit, match="(?s)stub has ended.*no such option"):
        stub.block(6)
    stub.stop()


def test_a_rival_without_an_environment_is_named(tmp_path):
    with pytest.raises(SystemExit, match="make bench-rivals"):
        Worker(Contender("stub", "no_such_library", []), tuned=False, log=tmp_path / "log")


def test_unknown_arguments_are_refused_before_anything_starts():
    with pytest.raises(SystemExit, match="known are parts=S1"):
        main(["part=S1"])
    with pytest.raises(SystemExit, match="known are parts=S1"):
        main(["parts=S1,S3"])


def test_the_language_model_and_its_tokens_can_be_read(tmp_path, monkeypatch):
    from groupsae.data.files import FileSource

    monkeypatch.setattr(lm, "BLOCKS", 3)
    monkeypatch.setattr(lm, "VOCAB", 4096)
    lm.write_lm(tmp_path)
    geometry = frozen(tmp_path).geometry
    assert (geometry.num_layers, geometry.d_model, geometry.vocab_size) == (6, 512, 4096)
    source = FileSource(path=str(tmp_path / "tokens.jsonl"), text_column=None)
    assert [len(each.token_ids) for each in source.documents()] == [256] * 3
