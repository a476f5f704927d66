"""Explanations of planted latents: their nulls, and their resamples of documents."""

import numpy as np
import pytest

from groupsae.interpretation.bits import packed
from groupsae.interpretation.explain import RESAMPLES, Explainer, explain_sae
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.rule_scores import Truth
from tests.helpers.planted_latents import CONTEXT, LATENTS, plant


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Interpretation:
    """Return planted latents, and activations along random directions.

    The first is large on one word at layer 0, the others are noise.
    """
    found = plant(tmp_path_factory.mktemp("planted") / "interpretation", blocks=200)
    collected = found.folder / "collected"
    projected = np.array(found.projections(0))
    projected[found.tokens == 20, 0] += 20
    projected.tofile(collected / "random.layer.0.bin")
    begins = np.arange(100) // 2 * 1000  # two blocks that begin in one document
    np.save(collected / "documents.npy", begins)
    return Interpretation(found.folder)


@pytest.fixture(scope="module")
def explained(found):
    explainer = Explainer(found)
    return explain_sae(found, "g", LATENTS, lambda parts: [explainer.explain("g", parts[0])])


def test_planted_latents_are_found_and_their_nulls_are_at_chance(explained):
    rates = [row["sharing"]["rates"][0] for row in explained[0]["latents"]]
    chance = 2 * np.mean(rates) / (1 + np.mean(rates))
    for row in explained[0]["latents"]:
        scores = row["layers"]["0"]["scores"]
        assert scores["f1"] >= 0.99
        assert scores["shift_f1"] <= chance + 0.05
        assert scores["null_f1"] <= chance + 0.05


def test_random_directions_are_explained_as_latents_of_the_same_density(found):
    explainer = Explainer(found)
    word, noise = (explainer.explain("g", [latent])[0]["direction_f1"] for latent in (0, 1))
    assert word["0"] > 0.9
    assert max(noise["0"], word["1"], noise["1"]) < 0.15


def test_documents_go_on_from_block_to_block(found):
    explain, tokens = found.num_tokens[0], found.tokens.reshape(-1, CONTEXT)
    numbers = found.documents[explain:].reshape(-1, CONTEXT)
    ends = (tokens[100:] == 0).sum(1)
    same_begin = numbers[0::2, 0] == numbers[1::2, 0]
    assert same_begin.all()
    assert (numbers[:, -1] - numbers[:, 0] == ends - (tokens[100:, -1] == 0)).all()
    assert found.documents[:explain].max() < numbers.min()


def test_resamples_draw_documents(found, explained):
    sae, resampled = explained
    assert resampled.shape == (LATENTS, 2, 2, RESAMPLES)
    explainer, documents = Explainer(found), np.unique(found.documents[found.num_tokens[0] :])
    assert explainer.resamples.shape == (RESAMPLES, len(documents))
    score = slice(found.num_tokens[0], None)
    fires = found.tokens[score] == 1
    guess = fires & (np.arange(len(fires)) % 3 > 0)
    guess |= (np.arange(len(fires)) % 50) == 0
    truth = Truth.of(np.flatnonzero(fires), np.ones(fires.sum()), len(fires))
    values = explainer._resampled(packed(guess), truth)
    for weights, value in list(zip(explainer.resamples, values, strict=True))[:5]:
        of_each = dict(zip(documents.tolist(), weights.tolist(), strict=True))
        w = np.array([of_each[d] for d in found.documents[score].tolist()])
        expected = 2 * (w * (guess & fires)).sum() / ((w * guess).sum() + (w * fires).sum())
        assert value == pytest.approx(expected, abs=1e-3)
