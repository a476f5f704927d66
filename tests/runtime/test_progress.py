"""Progress of long passes where no bar can move."""

from pathlib import Path

import pytest

from groupsae.runtime import progress
from groupsae.runtime.progress import ProgressLines, token_progress
from tests.helpers.runs import overrides, run


def test_a_log_file_gets_lines_with_the_share_that_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    with token_progress("measuring", 400, show=True) as advance:
        for _ in range(4):
            advance(100)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("measuring")]
    assert [line.split(",")[0] for line in lines] == [
        f"measuring: {25 * n}%" for n in (1, 2, 3, 4)
    ]
    assert lines[-1].endswith("0:00:00 left")


def test_packing_and_training_print_their_progress_into_a_log_file(
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    assert run(overrides(tiny_lm, tiny_text, tmp_path))[0] == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {n}/6" for n in range(1, 7)]
    assert all("tokens/s" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")
    packing = [line for line in printed.err.splitlines() if line.startswith("packing: ")]
    assert packing
    assert "tokens/s" in packing[0]


def test_without_a_total_no_share_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    ProgressLines("packing", None).update(1200)
    assert capsys.readouterr().out.startswith("packing: 1,200 tokens, ")


@pytest.mark.parametrize(("show", "silence"), [(False, 0.0), (True, 30.0)])
def test_nothing_is_printed_by_other_processes_or_in_the_first_half_minute(
    show: bool, silence: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", silence)
    with token_progress("measuring", 200, show=show) as advance:
        advance(100)
    assert "measuring:" not in capsys.readouterr().out
