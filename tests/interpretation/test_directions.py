"""Directions: neighbours by brute force, and effects on the logits by derivatives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.interpretation.directions import directions_of, effect_on_logits, final_norm
from groupsae.lm.hooked import HookedLM
from tests.helpers.families import WIDTH, save
from tests.helpers.lms import frozen

FAMILIES = ("gpt_neox", "gpt2", "llama", "gemma3", "olmo", "t5")


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> HookedLM:
    stack = {"stack": "decoder"} if request.param == "t5" else {}
    found = frozen(save(request.param, tmp_path), **stack).load_with_head(torch.device("cpu"))
    torch.manual_seed(0)
    norm = final_norm(found)
    assert norm is not None
    for parameter in norm.parameters():  # fresh norms weight all dimensions alike
        parameter.data.add_(torch.rand_like(parameter))
    return found


def test_effects_are_derivatives_of_the_logits(lm: HookedLM) -> None:
    """At a residual stream orthogonal to the direction, the norm's divisor does not move."""
    norm, head = final_norm(lm), lm.model.get_output_embeddings()
    assert norm is not None
    draws = torch.Generator().manual_seed(1)
    direction = torch.randn(1, WIDTH, generator=draws)
    direction /= direction.norm()
    centred = torch.allclose(norm(torch.ones(1, WIDTH)), norm(torch.zeros(1, WIDTH)), atol=1e-3)
    moved = direction - direction.mean() if centred else direction
    stream = torch.randn(1, WIDTH, generator=draws)
    stream = stream - stream.mean() if centred else stream
    stream = stream - (stream @ moved.T) / (moved @ moved.T) * moved
    rms = stream.square().mean().sqrt()
    effect = effect_on_logits(direction, norm, head)
    ahead, behind = (head(norm(stream + step * direction)) for step in (0.01, -0.01))
    torch.testing.assert_close(effect / rms, (ahead - behind) / 0.02, rtol=1e-2, atol=1e-3)


def test_neighbours_and_promoted_tokens_are_those_of_brute_force(lm: HookedLM) -> None:
    decoder = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(2))
    decoder /= decoder.norm(dim=1, keepdim=True)
    found = directions_of(decoder, lm)
    cosines = (decoder @ decoder.T).fill_diagonal_(-2).numpy()
    np.testing.assert_array_equal(found.nearest[:, 0], cosines.argmax(1))
    np.testing.assert_allclose(found.cosines[:, 0], cosines.max(1), rtol=1e-5)
    logits = effect_on_logits(decoder, final_norm(lm), lm.model.get_output_embeddings()).numpy()
    np.testing.assert_allclose(found.promoted_by[:, 0], logits.max(1), rtol=1e-4)
    np.testing.assert_allclose(found.suppressed_by[:, 0], logits.min(1), rtol=1e-4)
    assert (found.histogram.sum(1) == logits.shape[1]).all()


def test_a_model_without_logits_has_neighbours_only(tmp_path: Path) -> None:
    decoder = torch.nn.functional.normalize(torch.randn(8, WIDTH), dim=1)
    lm = frozen(save("bert", tmp_path)).load(torch.device("cpu"))
    found = directions_of(decoder, lm)
    assert found.promoted.shape == (8, 0)
    assert found.nearest.shape == (8, 5)
