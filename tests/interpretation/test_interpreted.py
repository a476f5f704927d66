"""A run that was interpreted by the command: its tables, its page, its report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import wandb

from groupsae.files.reading import read_metrics
from groupsae.grouping.groupings import groupings
from groupsae.interpretation.comparison import latents_frame
from groupsae.interpretation.files import Interpretation
from groupsae.reporting.load import read_explained
from groupsae.reporting.page import write_report
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import load_saes, load_suite
from tests.helpers.interpreted_run import interpret, interpreted
from tests.helpers.wandb_files import recorded, values


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interpreted(tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


def test_the_command_writes_the_tables(folder: Path):
    tables, plan = read_explained(folder), load_plan(folder)
    assert plan is not None
    names = [grouping.name for grouping in groupings(plan)]
    assert tables["groupings"]["grouping"].tolist() == names
    explained = json.loads((folder / "interpretation" / "explanations.json").read_text())["saes"]
    every = {n: load_saes(folder / "saes", [n]).directions(n) for n in explained}
    again = latents_frame(explained, groupings(plan), every)
    pd.testing.assert_frame_equal(again, tables["latents"], check_dtype=False)


def test_layers_with_maps_have_neighbours_and_effects_of_their_own(folder: Path):
    suite, found = load_suite(folder), Interpretation(folder / "interpretation")
    for layer in suite.layers:
        sae = found.saes[suite.group_of(layer)]
        about, decoder = sae.directions_at(layer), F.normalize(suite[layer].W_dec, dim=1)
        cosines = torch.einsum("ld,lnd->ln", decoder, decoder[torch.from_numpy(about.nearest)])
        torch.testing.assert_close(cosines, torch.from_numpy(about.cosines))
        shared = np.array_equal(about.promoted_by, sae.directions.promoted_by)
        assert shared == (len(suite[layer].layers) == 1)


def test_the_logger_of_the_run_gets_the_means_and_the_figures(folder: Path):
    rows = {name: value for _, name, value in read_metrics(folder / "metrics.csv")}
    means = read_explained(folder)["groupings"].set_index("grouping")
    (name,) = means.index
    for metric in ("f1", "one_label_f1", "labels", "tau_1"):
        assert rows[f"interpret/{metric}/{name}"] == pytest.approx(means[metric][name])
    assert any(name.startswith("train/") for name in rows)
    assert (folder / "figures" / "transfer.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
def test_wandb_gets_the_tables_and_the_histograms(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / kind))
    interpret(copy, "logger=wandb")
    wandb.finish()
    wandb.teardown()
    (file,) = copy.glob("wandb/offline-run-*/*.wandb")
    rows = [values(r.history.item) for r in recorded(file) if r.HasField("history")]
    logged = {key: value for row in rows for key, value in row.items()}
    tables = read_explained(copy)
    name = tables["groupings"]["grouping"][0]
    assert logged[f"interpret/f1/{name}"] == pytest.approx(tables["groupings"]["f1"][0])
    assert logged["interpret/latents/nrows"] == len(tables["latents"])
    histograms = [key for key in logged if key.endswith("_type") and logged[key] == "histogram"]
    assert len(histograms) == tables["latents"]["sae"].nunique()


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
        assert (page.parent / "transfer.png").is_file()
