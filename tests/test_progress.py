"""The progress of long passes where no bar can move."""

import pytest

from groupsae import progress
from groupsae.progress import token_progress


def test_a_line_says_how_far_where_the_output_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    with token_progress("measuring", 400, show=True) as advance:
        for _ in range(4):
            advance(100)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("measuring")]
    assert [line.split(",")[0] for line in lines] == [
        f"measuring: {25 * n}%" for n in (1, 2, 3, 4)
    ]
    assert lines[-1].endswith("0:00:00 left")


@pytest.mark.parametrize(("show", "silence"), [(False, 0.0), (True, 30.0)])
def test_nothing_is_said_by_other_processes_or_in_the_first_half_minute(
    show: bool, silence: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE", silence)
    with token_progress("measuring", 200, show=show) as advance:
        advance(100)
    assert "measuring:" not in capsys.readouterr().out
