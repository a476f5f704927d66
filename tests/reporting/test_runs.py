"""Several runs side by side."""

from pathlib import Path

import pytest

from groupsae.reporting import runs as several
from groupsae.reporting.load import read_run
from groupsae.reporting.page import compare, write_report
from tests.helpers.report_run import change, write_run


def html_of(*folders: Path, output: Path | None = None) -> str:
    return write_report(list(folders), output).read_text(encoding="utf-8")


def test_seeds_of_one_configuration_are_put_together(tmp_path: Path):
    a = write_run(tmp_path / "all" / "1M-s0-00000000", every=True, seed=0)
    b = write_run(tmp_path / "all" / "1M-s1-11111111", every=True, seed=1)
    c = write_run(tmp_path / "amad" / "1M-s0-22222222")
    found = several.families([read_run(folder) for folder in (a, b, c)])
    assert [(f.label, len(f.runs)) for f in found] == [("all", 2), ("amad", 1)]
    values = found[0].groupings.set_index("grouping").loc["complete-2"]
    assert values["fvu_high"] - values["fvu_low"] == pytest.approx(0.001)
    assert values["fvu"] == pytest.approx((values["fvu_low"] + values["fvu_high"]) / 2)
    table = several.seeds_baselines_table(found)
    assert table is not None
    row = table.frame.set_index(["against", "metric"]).loc[
        ("as many groups, evenly spaced", "FVU")
    ]
    assert row["difference_low"] == pytest.approx(
        row["difference_high"]
    )  # a seed shifts all alike
    assert row["lower_in"] == "2 of 2"
    text = html_of(a, b)
    assert "2 runs of 1 configuration." in text
    assert "2 of 2" in text
    page = next((tmp_path / "all").glob("report-*"))
    assert (page / "fvu_runs.png").exists()
    assert {file.name for file in page.glob("*.csv")} == {
        "runs.csv",
        "seeds.csv",
        "seeds_baselines.csv",
    }


def test_runs_that_were_not_evaluated_alike_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    a, b, c, d = (write_run(tmp_path / name, seed=i) for i, name in enumerate("abcd"))
    change(b, lambda v: v.update(tokens=512, exclude_special_tokens=True))
    alike = several.runs_table([read_run(a), read_run(c)], ["a", "c"])
    assert alike is not None
    assert alike.marked == []
    assert "measured_on" not in alike.columns
    change(d, lambda v: v.update(text="0123456789"))
    for other, what in (
        (b, "(held-out tokens: 32,768 and 512; special tokens: counted and left out)"),
        (d, "(text: unknown and 01234567)"),
    ):
        section = compare([read_run(a), read_run(other)], ["a", "other"])
        assert f"The runs were not evaluated alike {what}" in section.caveats[0]
        assert section.tables[0] is not None
        assert section.tables[0].marked == [1]
        assert section.tables[0].columns[-1] == "measured_on"
    capsys.readouterr()
    assert "not evaluated alike" in html_of(a, b, output=tmp_path / "out")
    assert capsys.readouterr().out.startswith("warning: The runs were not evaluated alike")


def test_runs_without_evaluation_can_be_compared(tmp_path: Path):
    a = write_run(tmp_path / "a", evaluated=False)
    b = write_run(tmp_path / "b", evaluated=False, seed=1)
    text = html_of(a, b, output=tmp_path / "out")
    assert "2 runs compared" in text
    assert "not evaluated: FVU of all layers, in training" in text


def test_rules_differ_in_the_figure(tmp_path: Path):
    runs = [read_run(write_run(tmp_path / name, every=name == "all")) for name in ("all", "one")]
    figure = several.against_cost(several.families(runs), "fvu")
    assert figure is not None
    lines = [
        bar.lines[0] for bar in figure.axes[0].containers if len(bar.lines[0].get_xdata()) > 1
    ]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert {look[2] for look in looks if look[1] in "os"} == {"-", "--"}
    assert len({look[0] for look in looks}) == 1  # a colour is a configuration


def test_the_table_names_the_kind_of_sae_and_its_l0(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    change(folders[1], lambda v: [sae.update(architecture="BatchTopK") for sae in v["saes"]])
    table = several.runs_table([read_run(folder) for folder in folders], ["a", "b"])
    assert table is not None
    assert list(table.frame["architecture"]) == ["TopK", "BatchTopK"]
    assert [table.cell(row, "l0").value for row in (0, 1)] == ["16.0"] * 2
    assert [table.cell(row, "seed").value for row in (0, 1)] == ["0"] * 2


def test_imported_saes_have_no_angles_or_seed(tmp_path: Path) -> None:
    import json

    own, theirs = write_run(tmp_path / "own"), write_run(tmp_path / "theirs")
    file = theirs / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adopted": "theirs"}))
    table = several.runs_table([read_run(own), read_run(theirs)], ["own", "theirs"])
    assert table is not None
    assert [table.cell(1, name).value for name in ("seed", "num_groups", "amad")] == ["–"] * 3
    assert table.cell(1, "grouping").value == "imported"
