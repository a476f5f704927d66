"""Angular distance and moments against a naive loop in float64, and by property."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from groupsae.grouping import moments
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.moments import LayerMoments
from groupsae.grouping.partition import angular_variance
from groupsae.runtime.errors import UserError

L, TOKENS, D = 4, 50, 8


def residual_stream(seed: int = 0, layers: int = L, tokens: int = TOKENS) -> Tensor:
    """Return activations that drift from layer to layer, as in a transformer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, tokens, D, generator=generator).cumsum(dim=0)


def naive(acts: Tensor) -> Tensor:
    """Return the angles by a double loop with the formula that is exact at both ends."""
    unit = acts.double() / acts.double().norm(dim=-1, keepdim=True)
    result = torch.zeros(len(acts), len(acts), dtype=torch.float64)
    for i, u in enumerate(unit):
        for j, v in enumerate(unit):
            halves = torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
            result[i, j] = (2 * halves / math.pi).mean()
    return result


def measured(acts: Tensor, mask: Tensor | None = None) -> Tensor:
    metric = AngularDistance(num_layers=len(acts))
    metric.update(acts, mask)
    return metric.compute()


def test_distances_equal_a_naive_double_loop() -> None:
    acts = residual_stream()
    assert_close(measured(acts), naive(acts), atol=1e-12, rtol=0)


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-4, 1e-2])
def test_distances_near_zero_keep_their_accuracy(step: float) -> None:
    acts = residual_stream()
    acts[1] = acts[0] + step * acts[2]
    acts[3] = -acts[0]
    assert_close(measured(acts), naive(acts), atol=1e-8, rtol=0)


def test_equal_orthogonal_and_opposite_vectors_give_0_half_and_1() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    expected = torch.tensor(
        [[0, 0, 0.5, 1], [0, 0, 0.5, 1], [0.5, 0.5, 0, 0.5], [1, 1, 0.5, 0]], dtype=torch.float64
    )
    assert_close(measured(x[:, None, :]), expected)


def test_cosines_that_round_beyond_one_are_clamped() -> None:
    acts = residual_stream(tokens=2000)[:1].expand(3, -1, -1) * torch.tensor([1, 3, 7.7]).reshape(
        3, 1, 1
    )
    result = measured(acts)
    assert result.isfinite().all()
    assert_close(result, torch.zeros_like(result), atol=1e-7, rtol=0)


def test_the_result_is_float64_symmetric_with_zero_diagonal() -> None:
    result = measured(residual_stream().bfloat16())
    assert result.dtype == torch.float64
    assert torch.equal(result, result.T)
    assert torch.equal(result.diagonal(), torch.zeros(L, dtype=torch.float64))


def test_the_scale_of_a_layer_does_not_matter() -> None:
    acts = residual_stream()
    scales = torch.tensor([1e-12, 1.0, 40.0, 1e12]).reshape(L, 1, 1)
    assert_close(measured(acts * scales), measured(acts), atol=1e-7, rtol=0)


def test_how_tokens_are_split_into_batches_does_not_matter() -> None:
    acts = residual_stream()
    metric = AngularDistance(num_layers=L)
    for batch in torch.split(acts, [1, 30, 19], dim=1):
        metric.update(batch)
    assert_close(metric.compute(), measured(acts), atol=1e-14, rtol=0)


def test_how_tokens_are_split_into_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(residual_stream())
    monkeypatch.setattr(moments, "CHUNK_CPU", 7 * L * D)
    assert_close(measured(residual_stream()), whole, atol=1e-14, rtol=0)


def test_sums_over_ranks_equal_one_rank() -> None:
    acts = residual_stream()
    ranks = [AngularDistance(num_layers=L) for _ in range(2)]
    for rank, part in zip(ranks, torch.split(acts, [10, 40], dim=1), strict=True):
        rank.update(part)
    ranks[0].merge_state(ranks[1])
    assert_close(ranks[0].compute(), measured(acts), atol=1e-14, rtol=0)


def test_variance_from_streamed_cosines_is_that_of_all_unit_vectors_at_once() -> None:
    acts = residual_stream(layers=6)
    acts[2, 7] = 0  # this token has no direction there: it counts nowhere
    ranks = [AngularDistance(num_layers=6) for _ in range(2)]
    for rank, part in zip(ranks, torch.split(acts, [13, 37], dim=1), strict=True):
        for batch in torch.split(part, 5, dim=1):
            rank.update(batch)
    ranks[0].merge_state(ranks[1])
    cosines = ranks[0].cosines()
    kept = torch.arange(TOKENS) != 7
    unit = torch.nn.functional.normalize(acts.double()[:, kept], dim=-1)
    exact = torch.einsum("itd,jtd->ij", unit, unit) / (TOKENS - 1)
    assert_close(cosines, exact, atol=1e-14, rtol=0)
    for group in ([3], [0, 1, 2], [1, 2, 3, 4, 5]):
        variance = (1 - unit[group].mean(dim=0).square().sum(dim=-1)).mean() / 2
        found = angular_variance(cosines.numpy(), group)
        assert found == pytest.approx(float(variance), abs=1e-14)
    # the mean of a cosine is not the cosine of the mean angle
    assert (cosines - torch.cos(math.pi * ranks[0].distances())).abs().max() > 0.01


def test_cosines_of_no_token_are_refused() -> None:
    with pytest.raises(UserError, match="No token was counted"):
        AngularDistance(num_layers=L).cosines()


def test_padding_is_left_out_whatever_it_holds() -> None:
    acts = residual_stream()
    mask = torch.arange(TOKENS) % 3 > 0
    padded = acts.clone()
    padded[:, ~mask] = torch.nan
    assert_close(measured(padded, mask), measured(acts[:, mask]), atol=0, rtol=0)


def test_tokens_with_a_zero_vector_are_left_out_of_all_pairs_and_counted() -> None:
    acts = residual_stream()
    acts[2, 7] = 0
    acts[0, 9] = 0
    keep = torch.ones(TOKENS, dtype=torch.bool)
    keep[[7, 9]] = False
    metric = AngularDistance(num_layers=L)
    metric.update(acts)
    assert metric.skipped == 2
    assert metric.count == TOKENS - 2
    assert_close(metric.compute(), naive(acts[:, keep]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_activation_that_is_not_finite_is_refused_and_names_its_layer(value: float) -> None:
    acts = residual_stream()
    acts[2, 7, 1] = value
    metric = AngularDistance(num_layers=L)
    with pytest.raises(UserError, match="activations of layer 2 contain NaN or infinity"):
        metric.update(acts)
    assert metric.count == 0
    with pytest.raises(UserError, match="layer 2"):
        LayerMoments(num_layers=L, d_model=D).update(acts)


def test_centring_subtracts_the_exact_mean() -> None:
    acts = residual_stream() + 10
    layers = LayerMoments(num_layers=L, d_model=D)
    for batch in torch.split(acts, 20, dim=1):
        layers.update(batch)
    metric = AngularDistance(num_layers=L, centring="mean")
    metric.set_mean(layers.moments().mean)
    metric.update(acts)
    centred = acts.double() - acts.double().mean(dim=1, keepdim=True)
    assert_close(metric.compute(), naive(centred), atol=1e-10, rtol=0)


def test_centring_without_a_mean_is_refused() -> None:
    metric = AngularDistance(num_layers=L, centring="mean")
    with pytest.raises(AssertionError, match="set_mean comes before"):
        metric.update(residual_stream())


def test_a_mean_without_centring_is_refused() -> None:
    metric = AngularDistance(num_layers=L)
    with pytest.raises(AssertionError, match="set_mean is for"):
        metric.set_mean(torch.zeros(L, D))


def test_an_unknown_centring_is_refused() -> None:
    with pytest.raises(UserError, match="centring is 'ema'"):
        AngularDistance(num_layers=L, centring="ema")


def test_a_calibration_without_tokens_is_refused() -> None:
    metric = AngularDistance(num_layers=L)
    metric.update(residual_stream(), torch.zeros(TOKENS, dtype=torch.bool))
    with pytest.raises(UserError, match="No token was counted"):
        metric.compute()


def test_moments_equal_those_of_the_complete_batch_in_float64() -> None:
    acts = residual_stream() * 100
    mask = torch.arange(TOKENS) % 3 > 0
    layers = LayerMoments(num_layers=L, d_model=D)
    for part, keep in zip(torch.split(acts, 20, dim=1), torch.split(mask, 20), strict=True):
        layers.update(part, keep)
    exact = acts[:, mask].double()
    mean, rms_norm, mean_norm, mean_square, mean_direction = layers.moments()
    squares = exact.square().sum(dim=-1)
    assert_close(mean, exact.mean(dim=1), rtol=1e-14, atol=1e-12)
    assert_close(rms_norm, squares.mean(dim=1).sqrt(), rtol=1e-14, atol=0)
    assert_close(mean_norm, squares.sqrt().mean(dim=1), rtol=1e-14, atol=0)
    assert_close(mean_square, exact.square().mean(dim=1), rtol=1e-14, atol=0)
    directions = exact / squares.sqrt().unsqueeze(-1)
    assert_close(mean_direction, directions.mean(dim=1), rtol=1e-13, atol=1e-15)


def test_moments_over_ranks_equal_one_rank() -> None:
    ranks = [LayerMoments(num_layers=L, d_model=D) for _ in range(3)]
    for rank, part in zip(ranks, torch.split(residual_stream(), [10, 40], dim=1), strict=False):
        rank.update(part)
        ranks[2].update(part)
    ranks[0].merge_state(ranks[1])
    for merged, alone in zip(ranks[0].moments(), ranks[2].moments(), strict=True):
        assert_close(merged, alone, rtol=1e-14, atol=1e-15)


def test_norms_are_bit_for_bit_those_of_plain_sums() -> None:
    acts = residual_stream(tokens=300)
    layers = LayerMoments(num_layers=L, d_model=D)
    layers.update(acts)
    of_tokens = acts.double().square().sum(dim=2)
    mean, rms_norm, mean_norm, *_ = layers.moments()
    assert torch.equal(mean, acts.double().sum(dim=1) / 300)
    assert torch.equal(rms_norm, (of_tokens.sum(dim=1) / 300).sqrt())
    assert torch.equal(mean_norm, of_tokens.sqrt().sum(dim=1) / 300)


def test_activations_divided_by_the_rms_norm_have_mean_squared_norm_one() -> None:
    acts = residual_stream()
    layers = LayerMoments(num_layers=L, d_model=D)
    layers.update(acts)
    scaled = acts.double() / layers.moments().rms_norm.reshape(L, 1, 1)
    assert_close(scaled.square().sum(dim=-1).mean(dim=1), torch.ones(L, dtype=torch.float64))


def test_a_model_of_one_layer_keeps_its_shapes() -> None:
    layers = LayerMoments(num_layers=1, d_model=1)
    layers.update(torch.ones(1, 3, 1))
    assert layers.moments().mean.shape == (1, 1)
    assert layers.moments().rms_norm.shape == (1,)
    assert layers.moments().shares().mean_share.tolist() == [1.0]
    metric = AngularDistance(num_layers=1)
    metric.update(residual_stream(layers=1))
    assert metric.distances().tolist() == [[0.0]]
