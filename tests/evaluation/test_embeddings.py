"""The effect of a splice on an encoder, against plain loops and what must come out exactly."""

import numpy as np
import pytest
import torch

from groupsae.evaluation import embeddings
from groupsae.evaluation.embeddings import (
    CleanEmbeddings,
    reciprocal_ranks,
    reciprocal_ranks_of_chance,
)


def test_embeddings_are_means_over_the_positions_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    output, other = torch.randn(2, 3, 6, 5, generator=generator).unbind()
    keep = torch.rand(3, 6, generator=generator) > 0.4
    keep[2] = False  # no position of the last block counts
    clean = CleanEmbeddings(output, keep)
    found = clean.effect(other)
    assert clean.sums["embeddings"].tolist() == [True, True, False]
    for block in range(2):
        mine, theirs = (x[block][keep[block]].mean(0) for x in (output, other))
        assert torch.allclose(clean.sums["embedding"][block], mine, atol=1e-6)
        cosine = mine @ theirs / (mine.norm() * theirs.norm())
        assert found["embedding_loss"][block] == pytest.approx(1 - float(cosine), abs=1e-6)
    assert found["embedding_loss"][2] == 0
    same = CleanEmbeddings(output, None).effect(output)["embedding_loss"]
    assert same.abs().max() < 1e-12


def test_blocks_are_ranked_by_cosine_among_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "RANKED", 40)
    generator = np.random.default_rng(0)
    found, documents = generator.standard_normal((50, 4)), generator.integers(0, 12, 50)
    ranks, counted = reciprocal_ranks(found, documents)
    first = reciprocal_ranks(found[:40], documents)
    assert np.array_equal(first, (ranks, counted))
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    for block in range(50):
        others = sorted((j for j in range(40) if j != block), key=lambda j: -unit[block] @ unit[j])
        hits = [rank for rank, j in enumerate(others, 1) if documents[j] == documents[block]]
        wanted = 1 / hits[0] if block < 40 and hits else 0
        assert ranks[block] == pytest.approx(wanted)
        assert counted[block] == (wanted > 0)


def test_chance_is_the_mean_over_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "RANKED", 40)
    generator = np.random.default_rng(0)
    documents = np.append(generator.integers(0, 6, 40), [0, 1])
    trials = [
        reciprocal_ranks(generator.standard_normal((42, 30)), documents)[0] for _ in range(600)
    ]
    chance = reciprocal_ranks_of_chance(documents)
    assert np.allclose(chance, np.mean(trials, axis=0), atol=0.07)
    assert chance.mean() == pytest.approx(np.mean(trials), abs=0.01)
    assert (chance[40:] == 0).all()
    assert reciprocal_ranks_of_chance(np.zeros(5, dtype=int)).tolist() == [1.0] * 5
