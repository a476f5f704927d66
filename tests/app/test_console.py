"""What a run prints."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from groupsae.app.console import print_evaluation, print_ledger, print_result
from tests.helpers.report_run import near, write_run


@pytest.mark.parametrize("every", [True, False])
def test_the_evaluation_and_the_ledger_fit_a_terminal(tmp_path: Path, every: bool):
    folder = write_run(tmp_path / "r", every=every)
    out = io.StringIO()
    console = Console(file=out, width=80)
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    together = {"ce": near(2.9, 0.1), "delta_ce": near(0.2, 0.01), "kl": near(0.1, 0.01)}
    together["delta_ce_percent"] = near(7.41, 0.5)
    evaluation["groupings"][0]["spliced_together"] = together
    print_evaluation(console, evaluation)
    print_ledger(console, json.loads((folder / "ledger.json").read_text()))
    text = out.getvalue()
    assert "0.1300 ±0.0040" in text
    assert "set to zero 9.000, to its\nmean 6.000" in text
    assert "at once: CE 2.9000 ±0.1000, ΔCE 0.2000 ±0.0100" in text
    assert "34.6\N{NO-BREAK SPACE}%" in text
    assert ("even-10" in text) == every
    assert ("−0.0191 ±0.0040   yes: better" in text) == every
    assert "…" not in text


def test_the_result_shows_the_tokens_of_each_layer():
    group = {"fvu": 0.1, "l0": 4.0, "dead": 0.0, "skipped": 0}
    summary = {
        "groups": {
            "layers.0-1": {"layers": [0, 1], "tokens_per_layer": {0: 1980, 1: 2020}, **group},
            "layers.2": {"layers": [2], "tokens_per_layer": {2: 4000}, **group},
        },
        "chosen": ["layers.0-1", "layers.2"],
        "fvu": 0.1,
        "cost": {"saving": 0.3},
        "tokens": 4000,
        "layers_per_token": 1,
        "tokens_per_second": 1.0,
        "folder": "x",
    }
    out = io.StringIO()
    print_result(Console(file=out, width=80), summary)
    assert "1,980 to 2,020" in out.getvalue()
    assert " 4,000 " in out.getvalue()
