"""A run that was interpreted by the command: its tables, its page, its report."""

import json
from pathlib import Path

import pandas as pd
import pytest

from groupsae.grouping.groupings import groupings
from groupsae.interpretation.comparison import latents_frame, matches
from groupsae.reporting.load import read_explained
from groupsae.reporting.page import write_report
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import load_saes
from tests.helpers.interpreted_run import interpreted


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interpreted(tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


def test_the_command_writes_the_tables(folder: Path):
    tables, plan = read_explained(folder), load_plan(folder)
    assert plan is not None
    names = [grouping.name for grouping in groupings(plan)]
    assert tables["groupings"]["grouping"].tolist() == names
    explained = json.loads((folder / "interpretation" / "explanations.json").read_text())["saes"]
    every = {n: load_saes(folder / "saes", [n]).saes[n].directions() for n in explained}
    again = latents_frame(explained, matches(explained, groupings(plan), every))
    pd.testing.assert_frame_equal(again, tables["latents"], check_dtype=False)


def test_the_report_links_to_latents_from_where_it_lies(folder: Path, tmp_path: Path):
    for output in (None, tmp_path / "elsewhere"):
        page = write_report([folder], output)
        html = page.read_text()
        assert "Inside the latents" in html
        links = [x.split('"')[0] for x in html.split('<a href="')[1:] if "index.html#" in x[:400]]
        assert len(links) >= 8
        for link in links:
            file, _, latent = link.partition("#")
            target = (page.parent / file).resolve()
            assert target == (folder / "interpretation" / "index.html").resolve()
            name, _, number = latent.partition("/")
            assert (folder / "saes" / name).is_dir()
            assert int(number) < 64
        assert output or links[0].startswith("../interpretation/index.html#")
        assert {f.name for f in page.parent.glob("*.png")} >= {
            "transfer.png",
            "explained_groups.png",
        }
        worst = pd.read_csv(page.parent / "explained.csv")
        assert "f1_difference_low" in worst
