"""What predicts the loss of sharing: figures, fits and orders of docs/predicting-loss.md."""

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.law import (
    LAWS,
    OF_PARTITIONS,
    Law,
    Model,
    Study,
    all_rows,
    error,
    figures,
    fit,
    formed,
    kendall,
    known,
    linear,
    published,
    r_squared,
)  # fmt: skip
from groupsae.grouping import amad

ANGLE = np.abs(np.subtract.outer([0.0, 0.1, 0.3], [0.0, 0.1, 0.3]))
LAYERS = {
    "angle": ANGLE,
    "cosine": np.cos(np.pi * ANGLE),
    "centred": np.eye(3),
    "grouped": np.eye(3),
    "linear": np.array([[1.0, 0.5, 0.2], [0.6, 1.0, 0.4], [0.1, 0.3, 1.0]]),
}


def test_figures_of_a_group_worked_by_hand() -> None:
    found = figures(LAYERS, (0, 1, 2))
    assert found["own"].mean() == pytest.approx(found["V"][0])
    assert found["own centred"] == pytest.approx([1 / 3] * 3)
    assert found["V centred"] == pytest.approx([1 / 3] * 3)
    assert found["V as grouped"] == pytest.approx([1 / 3] * 3)
    assert found["1 - R²"] == pytest.approx([1 - 1.7 / 3, 1 - 1.8 / 3, 1 - 1.6 / 3])
    assert found["share"] == pytest.approx(-np.log(1 - 2 * found["own"]))
    assert found["D"] == pytest.approx([0.3] * 3)
    assert found["S"] == pytest.approx([np.log(3)] * 3)
    assert all(values == pytest.approx([0.0]) for values in figures(LAYERS, (1,)).values())


def test_the_largest_angles_of_pythia_160m_give_its_published_amads_back() -> None:
    model = published()[1]
    given = [0.45, 0.372, 0.314, 0.267, 0.231, 0.179, 0.118, 0.075, 0.044, 0.019]
    square = np.nan_to_num(model.layers["angle"])  # unknown ones are smaller than the known
    found = [amad(square, groups) for groups in model.partitions.values()]
    assert found == pytest.approx(given, abs=1e-9)
    of_pairs = model.layers["angle"][[0, 3, 5, 7, 9], [1, 4, 6, 8, 10]]
    assert ((of_pairs > 0.15) & (of_pairs < 0.25)).all()  # as neighbours of other models


def test_the_published_losses_of_pythia_1b_follow_variance_and_size() -> None:
    """Fitted apart from this code, on the same figures, with every row alike."""
    rows = all_rows(published())["partition"]
    frame = known(rows[rows["model"] == "pythia-1b"], ("V", "S"))
    assert len(frame) == 7
    x, y = frame[["V", "S"]].to_numpy(float), frame["lost"].to_numpy(float)
    law = Law(("V", "S"), np.linalg.lstsq(x, y, rcond=None)[0])
    assert law.weights == pytest.approx([0.261, 0.0081], abs=0.002)
    assert r_squared(law, frame) == pytest.approx(0.9985, abs=0.0005)
    assert fit(frame, ("V", "S")).weights == pytest.approx(law.weights)


def test_each_length_of_training_has_its_own_weight_and_the_longest_counts() -> None:
    def trained(tokens: int, weight: float) -> Model:
        groups = [(0, 1, 2), (0, 1)]
        lost = {g: weight * 0.2 * figures(LAYERS, g)["V as grouped"] for g in groups}
        parts = {"complete 1": [(0, 1, 2)], "complete 2": [(0, 1), (2,)]}
        return Model("small", 0, tokens, LAYERS, np.array([0.1, 0.2, 0.3]), lost, parts)

    study = Study([trained(100, 3.0), trained(1000, 2.0)])
    lines = [line for line in study.by_length() if line.startswith("| small")]
    assert [line.split(" | ")[1] for line in lines] == ["100", "1,000"]
    assert [line.split(" | ")[5] for line in lines] == ["3.00 V", "2.00 V"]
    law = ("mean FVU × V as grouped",)
    assert fit(study.of("partition", law, "small"), law).weights == pytest.approx([2.0])


def test_a_fit_counts_models_alike_and_has_no_negative_weight() -> None:
    many = pd.DataFrame({"model": "many", "x": np.linspace(1, 2, 50)}).assign(y=1.0)
    few = pd.DataFrame({"model": "few", "x": np.linspace(1, 2, 50)[::7]}).assign(y=1.0)
    many["lost"], few["lost"] = 1.0 * many["x"], 3.0 * few["x"]
    both = fit(pd.concat([many, few]), ("x",))
    twice = fit(pd.concat([many, many, few]), ("x",))
    assert both.weights == pytest.approx(twice.weights)
    assert fit(many.assign(lost=-many["lost"]), ("x", "y")).weights == pytest.approx([0, 0])
    exact = fit(many, ("x",))
    assert error(exact, many) == pytest.approx(0, abs=1e-12)
    assert error(Law(("x",), np.zeros(1)), many) == 1


def test_a_linear_map_finds_a_rotated_layer_whose_angle_shows_nothing() -> None:
    chance = torch.Generator().manual_seed(0)
    acts = torch.randn(3, 4000, 8, generator=chance)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=chance)).Q
    acts[1] = acts[0] @ turn + 5
    found = linear(acts)
    assert found[0, 1] > 0.99
    assert found[1, 0] > 0.99
    assert np.abs(found[2, :2]).max() < 0.02
    assert (np.diag(found) == 1).all()


def test_all_partitions_that_groups_can_form() -> None:
    groups = [(0,), (0, 1), (0, 1, 2), (1,), (1, 2), (2,)]
    parts = formed(groups, 3)
    assert parts.counts.tolist() == [2, 2]  # neither one group nor one for each layer
    assert parts.mean(np.array([1.0, 10, 100, 1, 20, 2])) == pytest.approx([21 / 3, 12 / 3])


def test_kendall_compares_partitions_of_equal_size_only() -> None:
    counts = np.array([2, 2, 2, 3, 3])
    lost = np.array([3.0, 2, 1, 9, 8])
    assert kendall(lost, lost, counts) == 1
    assert kendall(-lost, lost, counts) == -1
    assert kendall(np.array([3.0, 2, 1, 0, 0]), lost, counts) == pytest.approx(3 / 4)
    assert np.isnan(kendall(lost[:1], lost[:1], counts[:1]))


def test_laws_of_layers_use_no_figure_of_partitions() -> None:
    assert all(len(law) == 1 for law in LAWS if set(law) & set(OF_PARTITIONS))
