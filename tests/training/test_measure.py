"""One pass over the calibration text gives distances of both centrings, norms and shares."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from groupsae.grouping.angles import AngularDistance
from groupsae.reporting.page import write_report
from groupsae.training import measure as measuring
from groupsae.training.callbacks import grouping
from groupsae.training.measure import Measurement, cached, measure
from tests.grouping.test_shares import command
from tests.helpers.data_modules import CONTEXT, data_module
from tests.helpers.evaluated import blocks as packed
from tests.helpers.lms import frozen
from tests.helpers.runs import overrides, run

TOKENS = 20 * 4 * CONTEXT


@pytest.fixture
def data(tiny_lm, tiny_text, tmp_path):
    return data_module(frozen(tiny_lm), tiny_text, tmp_path / "text", slots=[[0]])


def measured(data, tmp_path, centring, **changes):
    return measure(data, data.trainer, TOKENS, centring, tmp_path / centring)


@pytest.fixture
def acts(data):
    """Return the activations of all calibration tokens at once, float64."""
    batches = [batch.acts for batch in data.calibration_batches(TOKENS)]
    return torch.cat(batches, dim=1).double()


def distances(acts):
    metric = AngularDistance(num_layers=len(acts))
    metric.update(acts)
    return metric.distances().numpy()


def cosines(acts):
    unit = acts / acts.norm(dim=-1, keepdim=True)
    return (torch.einsum("itd,jtd->ij", unit, unit) / acts.shape[1]).numpy()


def test_both_centrings_shares_and_norms_equal_those_of_all_tokens_at_once(data, acts, tmp_path):
    plain, centred = (measured(data, tmp_path, each) for each in ("none", "mean"))
    deviations = acts - acts.mean(dim=1, keepdim=True)
    for found, given, other in ((plain, acts, deviations), (centred, deviations, acts)):
        np.testing.assert_allclose(found.distances, distances(given), atol=1e-10)
        np.testing.assert_allclose(found.other_distances, distances(other), atol=1e-10)
        np.testing.assert_allclose(found.cosines, cosines(given), atol=1e-10)
        np.testing.assert_allclose(found.other_cosines, cosines(other), atol=1e-10)
    squares = acts.square().sum(dim=2).mean(dim=1)
    shares = acts.mean(dim=1).square().sum(dim=1) / squares
    np.testing.assert_allclose(plain.shares.mean_share, shares, rtol=1e-12)
    largest = acts.square().mean(dim=1).max(dim=1).values / squares
    np.testing.assert_allclose(centred.shares.dimension_share, largest, rtol=1e-12)


def test_uncentred_distances_and_norms_are_bit_for_bit_the_plain_sums(data, tmp_path):
    """As before anything else was measured in this pass."""
    found = measured(data, tmp_path, "none")
    angles = AngularDistance(num_layers=4)
    sums, count = torch.zeros(2, 4, dtype=torch.float64), 0
    for batch in data.calibration_batches(TOKENS):
        angles.update(batch.acts)
        squares = batch.acts.double().square().sum(dim=2)
        sums += torch.stack([squares.sum(dim=1), squares.sqrt().sum(dim=1)])
        count += squares.shape[1]
    assert np.array_equal(found.distances, angles.compute().numpy())
    assert np.array_equal(found.rms_norms, (sums[0] / count).sqrt().numpy())
    assert np.array_equal(found.mean_norms, (sums[1] / count).numpy())


def test_the_sample_is_spread_over_all_positions_and_centred_by_the_mean_of_all(
    data, acts, tmp_path, monkeypatch
):
    monkeypatch.setattr(measuring, "SAMPLE", 300)
    found = measured(data, tmp_path, "none")
    count = acts.shape[1]
    chosen = torch.arange(0, count, 5)  # 4 would be the same four positions of each block
    assert len({int(place) % CONTEXT for place in chosen}) == CONTEXT
    deviations = (acts - acts.mean(dim=1, keepdim=True))[:, chosen]
    np.testing.assert_allclose(found.other_distances, distances(deviations), atol=1e-10)


def test_processes_have_the_sample_of_one(data, tiny_lm, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SAMPLE", 300)
    whole = {tuple(row) for row in sampled(data)}
    shares = [
        data_module(
            frozen(tiny_lm), tiny_text, tmp_path / "text", slots=[[0]], rank=rank, world_size=2,
            blocks_per_forward=1,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    parts = [{tuple(row) for row in sampled(share)} for share in shares]
    assert parts[0] | parts[1] == whole
    assert min(map(len, parts)) > len(whole) / 3


def sampled(data):
    """Yield block and position of every token of this process that is in the sample."""
    seen = 0
    for blocks in data.steps("calibration", data.steps_for("calibration", TOKENS)):
        size = len(blocks) * CONTEXT
        chosen = measuring._sampled(data, TOKENS, seen, size).nonzero().flatten()
        yield from ((blocks[place // CONTEXT], place % CONTEXT) for place in chosen.tolist())
        seen += size


def test_a_sample_without_tokens_that_count_leaves_the_rest(data, tmp_path, monkeypatch):
    def none(data, tokens, first, count):
        return torch.zeros(count, dtype=torch.bool)

    monkeypatch.setattr(measuring, "_sampled", none)
    found = measured(data, tmp_path, "none")
    assert found.other_distances is None
    assert found.distances.shape == (4, 4)


def test_a_measurement_is_read_as_it_was_written(data, tmp_path):
    found = measured(data, tmp_path, "none")
    found.save(tmp_path / "new.npz")
    again = cached(tmp_path / "new.npz")
    assert again.norm_factors("rms") == found.norm_factors("rms")
    assert again.losses == found.losses
    for name in ("other_distances", "cosines", "other_cosines", "means"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    for one, other in zip(again.shares, found.shares, strict=True):
        assert np.array_equal(one, other)


# ---- a model with a massive dimension -----------------------------------------------------------


@pytest.fixture(scope="module")
def massive_lm(tiny_lm, tmp_path_factory):
    """Return the folder of a model one dimension of which is large and the same for all tokens."""
    folder = tmp_path_factory.mktemp("massive")
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight.mul_(20)
        model.gpt_neox.embed_in.weight[:, 7] += 8
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_lm / name).read_bytes())
    return folder


def test_the_warning_names_a_command_that_gives_the_groups_it_promises(
    massive_lm, tiny_text, tmp_path, capsys
):
    uncentred = "calibration.centring=none"
    given = overrides(massive_lm, tiny_text, tmp_path, "groups.theta=0.21", uncentred)
    given[0] = f"output='{tmp_path}/my runs [1]'"
    status, folder = run(given)
    assert status == 0
    printed = capsys.readouterr().out
    warning = printed[printed.index("warning: Uncentred angles compare") :]
    stored = json.loads((folder / "groups.json").read_text())
    assert stored["plan"]["num_groups"] != stored["other"]["num_groups"]
    assert stored["other"]["centring"] == "mean"
    assert min(stored["shares"]["mean_share"]) > 0.5
    assert stored["shares"]["dimension"] == [7] * 4
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["shares"] == stored["shares"]
    assert summary["other"] == stored["other"]
    counts = stored["plan"]["num_groups"], stored["other"]["num_groups"]
    assert f"give {counts[0]} group" in warning
    assert f"centred ones {counts[1]}." in warning

    html = write_report([folder]).read_text()
    assert "Uncentred angles compare" in html
    assert "calibration.centring=mean" in html
    assert (folder / "report" / "shares.csv").exists()
    assert (folder / "report" / "amad.png").exists()

    advised = command("\n".join(warning.splitlines()[:2]))
    assert run(advised)[0] == 0
    second = capsys.readouterr().out
    assert "warning: Uncentred" not in second
    (other,) = (
        groups
        for groups in map(json.loads, map(Path.read_text, tmp_path.rglob("groups.json")))
        if groups["measured"]["centring"] == "mean"
    )
    assert other["plan"]["groups"] == stored["other"]["groups"]
    assert other["other"]["groups"] == stored["plan"]["groups"]


def test_centring_auto_is_that_of_the_rule(tiny_lm, tiny_text, tmp_path, monkeypatch, capsys):
    """Equal to the run that names the centring, and resumed with it."""
    for dominates, named in ((True, "mean"), (False, "none")):
        monkeypatch.setattr(grouping, "mean_dominates", lambda _, chosen=dominates: chosen)
        runs = {}
        for centring in ("auto", named):
            out = tmp_path / f"{named}-{centring}"
            given = overrides(tiny_lm, tiny_text, out, f"calibration.centring={centring}")
            if centring != "auto":
                given.append("b_dec_start=zero")
            status, folder = run(given)
            assert status == 0
            start = "mean" if dominates else "zero"
            expected = f"Chosen: calibration.centring={named} b_dec_start={start}, as the mean has"
            assert (expected in " ".join(capsys.readouterr().out.split())) == (centring == "auto")
            runs[centring] = json.loads((folder / "groups.json").read_text())
        assert runs["auto"]["measured"]["centring"] == named
        assert runs["auto"]["plan"] == runs[named]["plan"]
        status, _ = run(given)  # finished: confirmed, not repeated
        assert status == 0


def test_a_loss_above_guessing_by_frequency_is_warned_about(tiny_lm, tiny_text, tmp_path, capsys):
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path))
    assert status == 0
    losses = Measurement.load(folder / "angles.npz").losses
    counts = np.bincount(packed(folder, "train").flatten())
    share = counts[counts > 0] / counts.sum()
    assert losses.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    tokens = packed(folder, "calibration")[:8]
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    with torch.no_grad():
        expected = float(model(tokens, labels=tokens).loss)
    assert losses.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert losses.cross_entropy > losses.unigram_entropy  # the weights are random
    shown = capsys.readouterr().out
    assert "warning: the cross-entropy of" in shown
    assert shown.index("stream.prepend_bos=true") < shown.index("Run folder")
    assert losses._replace(cross_entropy=1.0).warning("x", False) is None
