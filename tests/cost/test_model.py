"""FLOP counts: the paper's figures, and the true count against a FLOP counter."""

import dataclasses
import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, GPTNeoXConfig

from groupsae.cost.counter import flop_counter
from groupsae.cost.model import (
    Trained,
    Workload,
    activation_flops,
    distance_flops,
    paper_saving,
    run_cost,
    sae_flops,
)
from groupsae.cost.stopwatch import Stopwatch
from groupsae.sae.base import GlobalBatch
from groupsae.sae.kernels import cpu
from groupsae.sae.topk import TopK
from tests.helpers.lms import hooked

# layers, d_model, A and T in PFLOPs for 1e9 tokens at 16x width and context 1024, the published
# number of groups, and savings in per cent: the paper's, and with the last layer on both sides.
PUBLISHED = {
    "160m": (12, 768, 207.62, 94.37, 6, 42.25, 35.2),
    "410m": (24, 1024, 704.64, 167.77, 9, 53.19, 49.6),
    "1b": (16, 2048, 1744.83, 671.09, 6, 53.76, 48.4),
}


@pytest.fixture(params=PUBLISHED)
def published(request):
    return PUBLISHED[request.param]


def test_flops_per_billion_tokens_are_the_published_ones(published):
    layers, width, activations, sae, *_ = published
    assert round(activation_flops(layers, width, 1024) / 1e6, 2) == activations
    assert round(sae_flops(width, 16 * width) / 1e6, 2) == sae


def test_savings_are_the_published_ones(published):
    layers, width, _, _, groups, saving, both_sides = published
    a, t = activation_flops(layers, width, 1024), sae_flops(width, 16 * width)
    assert round(100 * paper_saving(a, t, groups, layers), 2) == saving
    assert round(100 * paper_saving(a, t, groups + 1, layers), 1) == both_sides


def tiny_model(attention="eager"):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        vocab_size=50, max_position_embeddings=24, bos_token_id=0, eos_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    return AutoModel.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_the_forward_count_is_what_a_flop_counter_sees(last):
    """Counted: every matrix product of the blocks that run, attention in full.

    Eager attention, because the counter knows no formula for the CPU's fused kernel. Rotary angles
    are elementwise products here and count nothing, as norms and activation functions.
    """
    model, context, batch = tiny_model(), 24, 3
    lm = hooked(model, 4)
    tokens = torch.zeros(batch, context, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        lm.run(lm.inputs(tokens), [0, last], lambda *_: None, True)
    assert counter.get_total_flops() == batch * context * activation_flops(last + 1, 32, context)


@pytest.mark.parametrize("last", [0, 3])
def test_our_counter_knows_the_fused_attention_of_the_cpu(last):
    model, context, batch = tiny_model("sdpa"), 24, 3
    lm = hooked(model, 4)
    tokens = torch.zeros(batch, context, dtype=torch.int64)
    with flop_counter() as counter:
        lm.run(lm.inputs(tokens), [last], lambda *_: None, True)
    assert counter.get_total_flops() == batch * context * activation_flops(last + 1, 32, context)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_our_counter_sees_all_of_an_sae_step(k):
    """Products with a single vector, paid once for a batch, are not counted on either side."""
    d_model, rows = 16, 64
    generator = torch.Generator().manual_seed(0)
    sae = TopK(d_model=d_model, expansion=4, k=k, auxk_alpha=0, generator=generator)
    x = torch.randn(rows, d_model, generator=generator)
    with flop_counter() as counter:
        output = sae(x, GlobalBatch(torch.tensor(1.0), torch.zeros(0, dtype=torch.int64)))
        assert counter.get_total_flops() == rows * (
            2 * d_model * 64 + 2 * d_model * (k if k < 16 else 64)
        )  # of 16 all is dense
        sum(output.losses.values()).backward()
    assert counter.get_total_flops() == rows * sae.training_flops()


def test_our_counter_counts_each_row_that_is_read_once():
    table, x = torch.randn(10, 8), torch.randn(2, 8)
    picked, starts = torch.tensor([0, 1, 1, 9, 2]), torch.tensor([0, 3, 5])
    with flop_counter() as counter:
        cpu.combine(torch.ones(5), picked, starts, table)
    assert counter.get_total_flops() == 2 * 5 * 8
    with flop_counter() as counter:
        cpu.dots(x, table, starts, picked)
    assert counter.get_total_flops() == 2 * 5 * 8


def onednn():
    """Return the formula of the product that AVX-512 machines use for the encoder, if any."""
    if not torch.backends.mkldnn.is_available():
        return {}
    return {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x) * w[0]}


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_sae_count_is_what_a_flop_counter_sees_plus_the_sparse_decoder(k):
    """PyTorch's own counter sees the encoder's dense product, 2 d n.

    It knows no formula for what touches k rows (2 d k each for decoding, its two gradients and
    the encoder's): that part of `training_flops` is checked against its definition.
    Products with b_dec, which are paid once for the batch and not for each row, are subtracted.
    """
    d_model, rows = 16, 64
    generator = torch.Generator().manual_seed(0)
    sae = TopK(d_model=d_model, expansion=4, k=k, auxk_alpha=0, generator=generator)
    x = torch.randn(rows, d_model, generator=generator)
    with FlopCounterMode(display=False, custom_mapping=onednn()) as counter:
        sum(
            sae(
                x, GlobalBatch(torch.tensor(1.0), torch.zeros(0, dtype=torch.int64))
            ).losses.values()
        ).backward()
    counted = counter.get_total_flops()
    sparse = 8 * d_model * k if k < 16 else 0  # of 16 of 64 all is dense
    per_batch = counted - rows * (sae.training_flops() - sparse)
    assert 0 <= per_batch <= 6 * d_model * 64  # at most three products with a single vector


def test_a_dense_sae_costs_the_papers_count():
    d_model, d_sae, rows = 16, 64, 32
    encoder = torch.nn.Linear(d_model, d_sae)
    decoder = torch.nn.Linear(d_sae, d_model)
    with FlopCounterMode(display=False) as counter:
        decoder(encoder(torch.ones(rows, d_model)).relu()).sum().backward()
    assert counter.get_total_flops() == rows * sae_flops(d_model, d_sae)


def test_the_distance_count_is_what_a_flop_counter_sees():
    from groupsae.grouping.angles import AngularDistance

    metric = AngularDistance(num_layers=5, centring="none")
    acts = torch.randn(5, 30, 8, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        metric.update(acts)
    gathering = 2 * 30 * math.comb(5, 2)  # the sum over tokens, as a product with the mask
    assert counter.get_total_flops() in (
        30 * distance_flops(5, 8),
        30 * distance_flops(5, 8) + gathering,
    )


WORK = Workload(
    num_layers=6, layers_run=5, d_model=32, context=64, tokens=1000,
    sae_flops={n: 2 * 32 * n + 8 * 32 * 8 for n in (64, 128)},
    calibration_tokens=100,
    calibration_passes=1,
)  # fmt: skip


def test_the_true_cost_of_a_run_adds_up():
    cost = run_cost(WORK, saes=[3, 1, 1], num_groups=2, d_sae=128, distances=True)
    assert cost.activations == 24 * 5 * 32**2 + 4 * 5 * 64 * 32
    assert cost.sae == 2 * 32 * 128 + 8 * 32 * 8
    assert cost.calibration == 100 * activation_flops(6, 32, 64)
    assert cost.distances == 100 * distance_flops(6, 32)
    measured = cost.calibration + cost.distances
    assert cost.total == 1000 * (cost.activations + 3 * cost.sae) + measured
    assert cost.total_per_layer == 1000 * (cost.activations + 5 * cost.sae) + cost.calibration
    assert cost.saving == 1 - cost.total / cost.total_per_layer
    assert cost.paper_saving == paper_saving(cost.paper_activations, cost.paper_sae, 2, 6)
    both = paper_saving(cost.paper_activations, cost.paper_sae, 3, 5)
    assert cost.paper_saving_both_sides == both


def test_more_rows_of_a_token_cost_more_steps_of_an_sae_but_no_more_forwards():
    once, more = (
        run_cost(work, saes=[4, 1], num_groups=1, d_sae=128, distances=True)
        for work in (WORK, dataclasses.replace(WORK, layers_per_token=3))
    )
    assert more.total - once.total == 1000 * 2 * once.sae  # three rows, not one, of the first SAE
    assert more.total_per_layer == once.total_per_layer
    assert more.paper_saving == paper_saving(once.paper_activations, once.paper_sae, 3, 6)
    assert more.paper_saving_both_sides == paper_saving(
        once.paper_activations, once.paper_sae, 4, 5
    )


def test_groups_that_need_no_distances_pay_for_none():
    cost = run_cost(WORK, saes=[1] * 5, num_groups=5, d_sae=128, distances=False)
    assert cost.distances == 0
    assert cost.saving == 0
    assert run_cost(WORK, saes=[1] * 5, num_groups=5, d_sae=128, distances=True).saving < 0


def test_centring_costs_a_second_forward_but_no_second_distances():
    twice = dataclasses.replace(WORK, calibration_passes=2)
    assert twice.calibration == 2 * WORK.calibration
    assert twice.distances == WORK.distances


def test_smaller_saes_cost_what_the_groups_they_stand_for_cost():
    groups, smaller = [Trained(128, 2)] * 2, [Trained(128 * 2 // 4, 1)] * 4
    assert WORK.paper_total(groups) == WORK.paper_total(smaller)
    decoding = 8 * 32 * 8 * 1000  # k rows a token, whatever the width: the only difference
    assert WORK.saes(smaller) - WORK.saes(groups) == 2 * decoding


def test_the_stopwatch_adds_up_and_continues_from_a_stored_sum():
    watch = Stopwatch()
    watch.stop()  # never started
    assert watch.seconds == 0
    watch.seconds = 5.0
    with watch:
        time.sleep(0.01)
    watch.start()
    time.sleep(0.01)
    watch.stop()
    assert 5.02 <= watch.seconds < 6
