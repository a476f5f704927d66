"""The page of a report, and which runs it refuses."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from groupsae.reporting.page import write_report
from groupsae.runtime.errors import UserError
from tests.helpers.report_run import LAYERS, change, write_run


def html_of(*folders: Path, output: Path | None = None) -> str:
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


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(every_html: str):
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
    assert "FVU against G" not in ordinary_html
    assert not (ordinary / "report" / "fvu_groups.png").exists()


def test_a_run_at_its_start_is_shown_as_far_as_it_is(tmp_path: Path):
    folder = write_run(tmp_path / "r", evaluated=False)
    for name in ("summary.json", "ledger.json", "metrics.csv", "angles.npz"):
        (folder / name).unlink()
    text = html_of(folder)
    assert "not finished" in text
    assert "layers.3-10" in text


def test_a_truncated_metrics_file_is_read_up_to_its_last_complete_line(tmp_path: Path):
    folder = write_run(tmp_path / "r", evaluated=False)
    with (folder / "metrics.csv").open("a") as handle:
        handle.write("512,val/fvu/layers.0-2")
    assert "FVU on held-out text during training" in html_of(folder)


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


# ---- bad input ---------------------------------------------------------------------------------


def refusal(*folders: Path, output: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        write_report(list(folders), output)
    return str(caught.value)


def test_a_folder_that_is_no_run_is_refused(ordinary: Path, tmp_path: Path):
    assert "there is no such folder" in refusal(tmp_path / "nothing")
    assert "no run there (no groups.json)" in refusal(tmp_path)
    assert f"Did you mean {ordinary}?" in refusal(ordinary.parent)
    assert "named twice" in refusal(ordinary, ordinary)


def test_damaged_files_are_named(tmp_path: Path):
    for name in ("groups.json", "evaluation/evaluation.json", "angles.npz", "ledger.json"):
        folder = write_run(tmp_path / name.replace("/", "-"))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        assert f"{folder / name} is damaged" in refusal(folder)


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


def test_the_command_reports_what_is_wrong(tmp_path: Path):
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
