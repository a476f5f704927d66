"""The report: what it says for known numbers, what the page holds, what it refuses."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_run import LAYERS, near, write_run


def verdict_of(folder: Path) -> str:
    """Return everything the verdict says, with plain spaces."""
    from groupsae.reporting.load import read_run
    from groupsae.reporting.verdict import judge

    verdict = judge(read_run(folder))
    texts = [verdict.headline, *(f.text for f in verdict.findings), *verdict.caveats]
    return "\n".join(texts).replace("\N{NO-BREAK SPACE}", " ")


def change(folder: Path, edit: Any) -> None:
    path = folder / "evaluation" / "evaluation.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def html_of(*folders: Path, output: Path | None = None) -> str:
    from groupsae.reporting.page import write_report

    return write_report(list(folders), output).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what matters about a page: tags with attributes, headings, links, balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny" / "amad-0.2" / "s0")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny" / "all" / "s0", every=True)


@pytest.fixture(scope="module")
def every_html(every: Path) -> str:
    return html_of(every)


@pytest.fixture(scope="module")
def ordinary_html(ordinary: Path) -> str:
    return html_of(ordinary)


# ---- the verdict -------------------------------------------------------------------------------


def test_a_clear_difference_from_even_spacing_is_called_one(tmp_path: Path):
    text = verdict_of(write_run(tmp_path / "r", every=True, even_gap=0.1, width=0.001))
    assert "The chosen groups beat evenly spaced groups at the same number of groups" in text
    assert "not distinguishable" not in text


def test_worse_than_even_spacing_is_said_as_plainly(tmp_path: Path):
    text = verdict_of(write_run(tmp_path / "r", every=True, even_gap=-0.1, width=0.001))
    assert "The chosen groups lose to evenly spaced groups" in text


def test_an_interval_over_zero_is_not_distinguishable(tmp_path: Path):
    text = verdict_of(write_run(tmp_path / "r", every=True, even_gap=0.004, width=0.02))
    assert (
        "The chosen groups and evenly spaced groups at the same number of groups are not" in text
    )


def test_without_baselines_the_verdict_says_how_to_get_them(ordinary: Path):
    text = verdict_of(ordinary)
    assert "groups=all trains the baselines" in text
    assert "leave an FVU of 0.1729 [0.1689, 0.1769]" in text
    assert "even" not in text


def test_without_evaluation_the_verdict_names_the_command(tmp_path: Path):
    folder = write_run(tmp_path / "r", evaluated=False)
    assert f"python -m groupsae.evaluate run={folder}" in verdict_of(folder)


def test_numbers_of_the_verdict_are_those_of_the_file(every: Path):
    text = verdict_of(every)
    chosen = next(
        g
        for g in json.loads((every / "evaluation" / "evaluation.json").read_text())["groupings"]
        if g["chosen_by"]
    )
    lost = chosen["against_per_layer"]["fvu"]
    assert f"{1 - chosen['cost']['flops']:.1%}".replace("%", " %") in text
    assert f"FVU is higher by {lost['value']:.4f} [{lost['low']:.4f}, {lost['high']:.4f}]" in text
    assert "interval " not in text.split("Measured on")[0]  # one notation for intervals
    assert "2 groups of layers (0–2 · 3–10)" in text
    assert "This is one training run (seed 0)" in text


def test_a_paired_comparison_goes_before_the_cautious_one(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True, even_gap=0.1, width=0.001)
    assert "cautious" in verdict_of(folder)
    row = {
        "grouping": "complete-2",
        "baseline": "even-2",
        "fvu": near(-0.01, 0.02),
        "delta_ce": near(0.0, 0.01),
    }
    change(folder, lambda values: values.update(comparisons=[row]))
    text = verdict_of(folder)
    assert "evenly spaced groups at the same number of groups are not distinguishable" in text
    assert "difference −0.0100 [−0.0300, 0.0100]" in text


def test_a_mixed_result_and_one_in_part(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)
    row = {"grouping": "complete-2", "baseline": "even-2", "fvu": near(-0.01, 0.002)}
    change(folder, lambda v: v.update(comparisons=[{**row, "delta_ce": near(0.01, 0.002)}]))
    assert "Against evenly spaced groups at the same number of groups the result is mixed" in (
        verdict_of(folder)
    )
    change(folder, lambda v: v.update(comparisons=[{**row, "delta_ce": near(0.01, 0.02)}]))
    assert "do better than evenly spaced groups at the same number of groups, in part" in (
        verdict_of(folder)
    )


def test_a_single_sequence_has_no_interval_and_no_verdict(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)

    def drop(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, dict) and "low" in inner:
                inner["low"] = inner["high"] = None
            elif isinstance(inner, dict | list):
                drop(inner)

    change(folder, drop)
    text = verdict_of(folder)
    assert "no interval" in text
    assert "beat" not in text
    assert "not distinguishable" not in text
    html_of(folder)


def test_a_negative_saving_is_not_called_a_saving(tmp_path: Path):
    folder = write_run(tmp_path / "r")

    def dear(values: dict[str, Any]) -> None:
        values["groupings"][0]["cost"]["flops"] = 1.05

    change(folder, dear)
    assert "cost 5.0 % more FLOPs" in verdict_of(folder)


def test_one_grouping_is_called_the_chosen_one_though_theta_picks_one_for_every_rule(
    tmp_path: Path,
):
    from groupsae.reporting.load import read_run
    from groupsae.reporting.page_tables import groupings_table

    folder = write_run(tmp_path / "r", every=True)
    change(
        folder,
        lambda v: next(g for g in v["groupings"] if g["name"] == "even-3").update(
            chosen_by=["even"]
        ),
    )
    table = groupings_table(read_run(folder))
    assert table is not None
    chosen = [row[0].value for row in table.rows if "chosen" in row[0].note]
    assert chosen == ["complete-2"]
    assert table.marked == [0]


def test_a_baseline_that_is_missing_is_said_to_be(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)

    def drop(values: dict[str, Any]) -> None:
        kept = [g for g in values["groupings"] if "even" not in g["rules"] or g["num_groups"] > 10]
        values["groupings"] = kept

    change(folder, drop)
    assert "Evenly spaced groups were not trained" in verdict_of(folder)


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_needs_nothing_beside_itself(every_html: str):
    page = Page(every_html)
    assert page.open == []
    assert not page.all("script")
    assert not page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(link["href"].startswith("data:") for link in page.all("link"))
    assert all(a["href"].startswith("#") for a in page.all("a"))
    assert not re.search(r"https?://|url\(|@import", every_html)


def test_every_figure_is_also_a_png(every: Path, every_html: str):
    page = Page(every_html)
    files = list((every / "report").glob("*.png"))
    assert len(files) == len(page.all("img")) == 17
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_headings_are_in_order_and_links_lead_somewhere(
    ordinary: Path, every: Path, every_html: str
):
    for text in (every_html, html_of(ordinary, every, output=every / "both")):
        page = Page(text)
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(set(ids)) == len(ids)
        assert {a["href"][1:] for a in page.all("a")} <= set(ids)
        assert all(image["alt"] for image in page.all("img"))


def test_the_configuration_is_escaped(ordinary_html: str):
    assert "<script>" not in ordinary_html
    assert "&lt;script&gt;alert(&#34;no &amp; never&#34;)" in ordinary_html


def test_the_page_is_the_same_again(ordinary: Path, ordinary_html: str):
    assert html_of(ordinary) == ordinary_html


def test_an_ordinary_run_shows_layers_but_no_curves_over_groupings(
    ordinary: Path, ordinary_html: str
):
    assert "FVU of every layer" in ordinary_html
    assert "FVU against the number of groups" not in ordinary_html
    assert not (ordinary / "report" / "fvu_groups.png").exists()


def test_a_run_at_its_start_is_shown_as_far_as_it_is(tmp_path: Path):
    folder = write_run(tmp_path / "r", evaluated=False)
    for name in ("summary.json", "ledger.json", "metrics.csv", "angles.npz"):
        (folder / name).unlink()
    text = html_of(folder)
    assert "not finished" in text
    assert "layers.3-10" in text


def test_a_cut_metrics_file_is_read_as_far_as_it_goes(tmp_path: Path):
    folder = write_run(tmp_path / "r", evaluated=False)
    with (folder / "metrics.csv").open("a") as handle:
        handle.write("512,val/fvu/layers.0-2")
    assert "Held-out FVU and dead latents" in html_of(folder)


@pytest.mark.parametrize(("last_layer", "layers"), [("group", 1), ("skip", 2)])
def test_few_layers(tmp_path: Path, last_layer: str, layers: int):
    import numpy as np

    from groupsae.grouping.partition import build_partition
    from groupsae.grouping.plan import GroupPlan

    folder = write_run(tmp_path / "r", evaluated=False)
    values = json.loads((folder / "groups.json").read_text())
    part = build_partition(np.zeros((1, 1)), [[0]], "complete")
    values["plan"] = GroupPlan(part, last_layer, layers).to_json()
    (folder / "groups.json").write_text(json.dumps(values))
    np.savez(folder / "angles.npz", distances=0.1 * (1 - np.eye(layers)))
    assert "1 group of layers (0)" in html_of(folder).replace("\N{NO-BREAK SPACE}", " ")


# ---- several runs ------------------------------------------------------------------------------


def test_seeds_of_one_configuration_are_put_together(tmp_path: Path):
    a = write_run(tmp_path / "all" / "1M-s0-00000000", every=True, seed=0)
    b = write_run(tmp_path / "all" / "1M-s1-11111111", every=True, seed=1)
    c = write_run(tmp_path / "amad" / "1M-s0-22222222")
    from groupsae.reporting.load import read_run
    from groupsae.reporting.seeds import difference, families, spread

    found = families([read_run(each) for each in (a, b, c)])
    assert [(f.label, len(f.runs)) for f in found] == [("all", 2), ("amad", 1)]
    values = spread(found[0], "fvu", "complete-2")
    gap = difference(found[0], "fvu", "complete-2", "even-2")
    assert values is not None
    assert gap is not None
    assert values.high - values.low == pytest.approx(0.001)
    assert values.mean == pytest.approx((values.high + values.low) / 2)
    assert gap.low == pytest.approx(gap.high)  # the seed shifts all alike
    text = html_of(a, b)
    assert "2 runs of 1 configuration." in text
    assert "lower in 2 of 2" in text
    page = next((tmp_path / "all").glob("report-*"))
    assert (page / "fvu_runs.png").exists()


def test_runs_that_were_not_evaluated_alike_are_said_to_be_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from groupsae.reporting.load import read_run
    from groupsae.reporting.several import compare_runs

    a, b, c, d = (write_run(tmp_path / name, seed=i) for i, name in enumerate("abcd"))
    change(b, lambda v: v.update(tokens=512, exclude_special_tokens=True))
    alike = [read_run(a), read_run(c)]
    verdict, tables, _ = compare_runs(alike, ["a", "c"])
    assert not any("alike" in text for text in verdict.caveats)
    assert tables[0].marked == []
    assert "evaluated on" not in tables[0].columns
    change(d, lambda v: v.update(text="0123456789"))
    for other, what in (
        (b, "(held-out tokens: 32,768 and 512; special tokens: counted and left out)"),
        (d, "(text: unknown and 01234567)"),
    ):
        verdict, tables, _ = compare_runs([read_run(a), read_run(other)], ["a", "other"])
        assert f"The runs were not evaluated alike {what}" in verdict.caveats[0]
        assert tables[0].marked == [1]
        assert tables[0].columns[-1] == "evaluated on"
        assert all(len(row) == len(tables[0].columns) for row in tables[0].rows)
    capsys.readouterr()
    assert "not evaluated alike" in html_of(a, b, output=tmp_path / "out")
    assert capsys.readouterr().out.startswith("warning: The runs were not evaluated alike")


def test_runs_without_evaluation_can_be_compared(tmp_path: Path):
    a = write_run(tmp_path / "a", evaluated=False)
    b = write_run(tmp_path / "b", evaluated=False, seed=1)
    assert "2 runs compared" in html_of(a, b, output=tmp_path / "out")


# ---- figures for others ------------------------------------------------------------------------


def test_evaluation_figures_are_those_of_the_evaluation(ordinary: Path, every: Path):
    from matplotlib.figure import Figure

    from groupsae.reporting.collection import evaluation_figures
    from groupsae.reporting.load import read_run

    few, many = evaluation_figures(read_run(ordinary)), evaluation_figures(read_run(every))
    assert set(few) == {"fvu_layers", "delta_ce_layers", "profiles", "density"}
    assert set(few) < set(many)
    assert all(isinstance(figure, Figure) for figure in many.values())
    assert "distances" not in many


def test_no_line_turns_back_though_even_groups_may_be_less_close_with_more_of_them(
    tmp_path: Path,
):
    from groupsae.reporting.load import read_run
    from groupsae.reporting.quality import against_amad

    folder = write_run(tmp_path / "r", every=True)

    def less_close(values: dict[str, Any]) -> None:
        next(g for g in values["groupings"] if g["name"] == "even-4")["amad"] = 0.3

    change(folder, less_close)
    axes = against_amad(read_run(folder), "fvu").axes[0]
    (line,) = (each for each in axes.lines if each.get_label() == "evenly spaced")
    x = line.get_xdata()
    assert len(x) > 3
    assert list(x) == sorted(x)


def test_rules_are_told_apart_in_the_figure_of_several_runs(every: Path, ordinary: Path):
    from groupsae.reporting.load import read_run
    from groupsae.reporting.seeds import families
    from groupsae.reporting.several import against_cost

    figure = against_cost(families([read_run(every), read_run(ordinary)]), "fvu")
    assert figure is not None
    lines = [
        bar.lines[0] for bar in figure.axes[0].containers if len(bar.lines[0].get_xdata()) > 1
    ]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert {look[2] for look in looks if look[1] in "os"} == {"-", "--"}
    assert len({look[0] for look in looks}) == 1  # a colour is a configuration


def test_a_table_with_one_grouping_does_not_promise_every_one(ordinary_html: str):
    assert "Every grouping:" not in ordinary_html
    assert "Mean over the grouped layers; cost against one SAE per layer" in ordinary_html


def test_a_table_that_goes_on_beyond_the_edge_shows_a_shadow_there(ordinary_html: str):
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto;[^}]*no-repeat local", ordinary_html)


def test_the_dendrogram_keeps_the_layers_in_order():
    from groupsae.reporting.figures import linkage_tree
    from tests.helpers.report_run import distances

    axes = linkage_tree(distances()[:11, :11], [[0, 1, 2], list(range(3, 11))]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map(str, range(11)))


def test_print_evaluation_fits_a_terminal(every: Path, ordinary: Path):
    import io

    from rich.console import Console

    from groupsae.app.console import print_evaluation

    for folder, groupings in ((every, True), (ordinary, False)):
        values = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        out = io.StringIO()
        print_evaluation(Console(file=out, width=80), values)
        assert "0.1300 ±0.0040" in out.getvalue()
        assert "…" not in out.getvalue()
        assert ("even-10" in out.getvalue()) == groupings


def test_the_scale_of_the_ce_score_is_shown(every: Path, every_html: str):
    from groupsae.reporting.load import read_run
    from groupsae.reporting.page_tables import scale_table

    table = scale_table(read_run(every))
    assert table is not None
    assert "2.7000 [2.6800, 2.7200] nats" in table.caption
    assert [[c.value for c in row] for row in table.rows][1] == ["1", "9.0000", "6.0000", "2.00"]
    assert "becomes with a layer set to zero" in every_html


def test_print_result_shows_the_tokens_that_each_layer_got():
    import io

    from rich.console import Console

    from groupsae.app.console import print_result

    group = {"fvu": 0.1, "l0": 4.0, "dead": 0.0}
    summary = {
        "groups": {
            "layers.0-1": {"layers": [0, 1], "tokens_per_layer": {0: 1980, 1: 2020}, **group},
            "layers.2": {"layers": [2], "tokens_per_layer": {2: 4000}, **group},
        },
        "chosen": ["layers.0-1", "layers.2"],
        "fvu": 0.1,
        "cost": {"saving": 0.3},
        "tokens": 4000,
        "tokens_per_second": 1.0,
        "folder": "x",
    }
    out = io.StringIO()
    print_result(Console(file=out, width=80), summary)
    assert "1,980 to 2,020" in out.getvalue()
    assert " 4,000 " in out.getvalue()


# ---- bad input ---------------------------------------------------------------------------------


def refusal(*folders: Path, output: Path | None = None) -> str:
    from groupsae.reporting.page import write_report
    from groupsae.runtime.errors import UserError

    with pytest.raises(UserError) as caught:
        write_report(list(folders), output)
    return str(caught.value)


def test_what_is_no_run_is_refused_in_a_sentence(ordinary: Path, tmp_path: Path):
    assert "there is no such folder" in refusal(tmp_path / "nothing")
    assert "no run there (no groups.json)" in refusal(tmp_path)
    assert f"Did you mean {ordinary}?" in refusal(ordinary.parent)
    assert "named twice" in refusal(ordinary, ordinary)


def test_damaged_files_are_named(tmp_path: Path):
    for name in ("groups.json", "evaluation/evaluation.json", "angles.npz", "ledger.json"):
        folder = write_run(tmp_path / name.replace("/", "-"))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        assert f"{folder / name} is cut short or damaged" in refusal(folder)


def test_groups_that_were_changed_by_hand_are_refused_with_the_file(tmp_path: Path):
    folder = write_run(tmp_path / "r")
    file = folder / "groups.json"
    values = json.loads(file.read_text())
    values["plan"]["groups"] = [[0], list(range(1, LAYERS - 1))]
    file.write_text(json.dumps(values))
    sentence = refusal(folder)
    assert sentence.startswith(f"{file}: ")
    assert "changed by hand" in sentence
    for damage in ({}, {"plan": 3}, {"plan": {**values["plan"], "groups": "x"}}):
        file.write_text(json.dumps(damage))
        assert str(file) in refusal(folder)


def test_another_format_is_refused(tmp_path: Path):
    folder = write_run(tmp_path / "r")
    change(folder, lambda values: values.update(format=2))
    assert "has format 2; this version reads 1" in refusal(folder)


def test_a_place_that_cannot_be_written_is_named(ordinary: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "Set output=<folder>" in refusal(ordinary, output=tmp_path / "file" / "inside")


# ---- the command -------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "groupsae.report", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_takes_runs_with_commas(tmp_path: Path):
    a = write_run(tmp_path / "a=1" / "it's", evaluated=False)
    b = write_run(tmp_path / "b b", evaluated=False)
    done = command(f"run={a},{b}", f"output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    assert str(tmp_path / "out" / "report.html") in done.stdout


def test_the_command_says_what_is_wrong(tmp_path: Path):
    for arguments, message in (
        ((f"run={tmp_path}",), "error: run="),
        ((), "error: run has no default"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert "Traceback" not in done.stderr


def test_writing_a_report_needs_no_training_stack():
    code = "import sys, groupsae.reporting.page; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "lightning", "transformers", "wandb", "hydra"} & set(done)


def test_runs_side_by_side_say_which_kind_of_sae_and_its_l0(tmp_path: Path) -> None:
    from groupsae.reporting.load import read_run
    from groupsae.reporting.several import side_by_side

    folders = [write_run(tmp_path / name) for name in "ab"]
    change(folders[1], lambda v: [sae.update(architecture="BatchTopK") for sae in v["saes"]])
    runs = [read_run(folder) for folder in folders]
    table = side_by_side(runs, ["a", "b"])
    columns = {name: [row[i].value for row in table.rows] for i, name in enumerate(table.columns)}
    assert columns["SAE"] == ["TopK", "BatchTopK"]
    assert columns["L0"] == [f"{runs[0].l0:.1f}"] * 2
    assert len({len(row) for row in table.rows} | {len(table.columns)}) == 1


def test_saes_that_others_trained_are_not_given_angles_seeds_or_a_command(tmp_path: Path) -> None:
    from groupsae.reporting.load import read_run
    from groupsae.reporting.sections import provenance
    from groupsae.reporting.several import side_by_side
    from groupsae.reporting.verdict import judge

    folder = write_run(tmp_path / "a")
    file = folder / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adopted": "theirs"}))
    run = read_run(folder)
    verdict = judge(run)
    said = " ".join([f.text for f in verdict.findings] + verdict.caveats)
    assert "adopted from theirs" in said
    assert "AMAD" not in said + str(verdict.tiles)
    assert "training run" not in said
    facts = dict(provenance(run))
    assert facts["adopted from"] == "theirs"
    assert "command" not in facts
    (row,) = side_by_side([run], ["a"]).rows
    assert [cell.value for cell in row[3:6]] == ["–"] * 3


def test_a_model_without_next_tokens_has_no_sentences_about_cross_entropy(tmp_path: Path) -> None:
    from groupsae.reporting.load import read_run
    from groupsae.reporting.page_tables import scale_table
    from groupsae.reporting.verdict import judge

    folder = write_run(tmp_path / "a")

    def without_ce(evaluation: dict[str, Any]) -> None:
        evaluation["ce"] = None
        for each in evaluation["groupings"]:
            each["against_per_layer"] = None
            each["grouped_layers"].update(delta_ce=None, delta_ce_percent=None)

    change(folder, without_ce)
    run = read_run(folder)
    assert scale_table(run) is None
    quality = next(f.text for f in judge(run).findings if f.title == "Quality")
    assert "predicts no next token" in quality
    assert "nats" not in quality
