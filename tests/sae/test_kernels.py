"""Sums over active latents against loops, and their gradients against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.cost.counter import flop_counter
from groupsae.sae.kernels import cpu, dense
from groupsae.sae.kernels.dispatch import COLUMNS_PER_K, affine, group_size, kernels_for, top_k
from groupsae.sae.sparse import Decode, Encode, Entries

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums in another order
BACKENDS = [dense, cpu]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged(counts: list[int], latents: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the picked latents of rows with so many entries, and where the rows start."""
    source = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(latents, generator=source)[:count] for count in counts]
    picked = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])
    return picked, torch.tensor([0, *counts]).cumsum(0)


# empty rows at the start, inside and at the end; a row with all; no entry at all; no row at all
COUNTS = [[0, 3, 0, 0, 5, 1, 0], [9], [0, 0], [2, 2, 2], []]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS)
def test_combine_equals_a_loop(kernels, counts):
    picked, starts = ragged(counts, 9)
    weights, table = draw(len(picked)), draw(9, 6, seed=1)
    expected = torch.zeros(len(counts), 6, dtype=torch.float64)
    for row in range(len(counts)):
        for entry in range(int(starts[row]), int(starts[row + 1])):
            expected[row] += weights[entry] * table[picked[entry]]
    torch.testing.assert_close(kernels.combine(weights, picked, starts, table), expected, **EXACT)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS)
def test_dots_equal_a_loop(kernels, counts):
    picked, starts = ragged(counts, 9)
    x, table = draw(len(counts), 6), draw(9, 6, seed=1)
    expected = torch.zeros(len(picked), dtype=torch.float64)
    for row in range(len(counts)):
        for entry in range(int(starts[row]), int(starts[row + 1])):
            expected[entry] = sum(x[row, i] * table[picked[entry], i] for i in range(6))
    torch.testing.assert_close(kernels.dots(x, table, starts, picked), expected, **EXACT)


@pytest.mark.parametrize("counts", [c for c in COUNTS if sum(c)])
def test_entries_by_latent_are_all_entries_sorted(counts):
    picked, starts = ragged(counts, 9)
    order, rows, bounds = Entries(picked, starts, 9).by_latent
    row_of = [row for row, count in enumerate(counts) for _ in range(count)]
    expected = sorted(
        (int(latent), row, e) for e, (latent, row) in enumerate(zip(picked, row_of, strict=True))
    )
    assert [(int(picked[e]), int(r), int(e)) for e, r in zip(order, rows, strict=True)] == expected
    for latent in range(9):
        assert bounds[latent + 1] - bounds[latent] == (picked == latent).sum()


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["sparse", "dense"])
def test_the_gradients_of_decoding_are_those_of_finite_differences(share):
    picked, starts = ragged([0, 2, 3] if share < 0.5 else [9, 9, 9], 9)
    entries = Entries(picked, starts, 9)
    assert (entries.kernels(draw(9, 4)) is dense) == (share > 0.5)
    inputs = draw(len(picked)).requires_grad_(), draw(9, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda acts, table: Decode.apply(acts, table, entries), inputs)


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["sparse", "dense"])
def test_the_gradients_of_encoding_are_those_of_finite_differences(share):
    picked, starts = ragged([0, 2, 3] if share < 0.5 else [9, 9, 9], 9)
    entries = Entries(picked, starts, 9)
    shapes = [(3, 4), (9, 4), (9,), (4,)]  # x, W_enc, b_enc, b_dec
    inputs = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *given: Encode.apply(None, *given, entries), inputs)


def test_values_that_were_found_already_have_the_same_gradients():
    picked, starts = ragged([4, 1, 2], 9)
    entries = Entries(picked, starts, 9)
    inputs = [
        draw(*s, seed=i).requires_grad_() for i, s in enumerate([(3, 4), (9, 4), (9,), (4,)])
    ]
    computed = Encode.apply(None, *inputs, entries)
    known = Encode.apply(computed.detach(), *inputs, entries)
    assert torch.equal(known, computed)
    pull = draw(7, seed=5)
    for a, b in zip(
        torch.autograd.grad(computed, inputs, pull),
        torch.autograd.grad(known, inputs, pull),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [1, 32])
def test_in_float32_at_size_the_sums_are_right_to_rounding(k):
    """Against float64; 1e-5 of the largest value: sums of up to 512 products of float32."""
    source = torch.Generator().manual_seed(0)
    x, table = torch.randn(256, 512, generator=source), torch.randn(1024, 512, generator=source)
    latents = torch.rand(256, 1024, generator=source).topk(k, dim=1).indices
    entries = Entries.of_rows(latents, 1024)
    assert entries.kernels(table) is cpu
    acts = torch.rand(256 * k, generator=source)
    order, rows, starts = entries.by_latent
    for case in (
        (cpu.combine, dense.combine, (acts, entries.latents, entries.starts, table)),
        (cpu.combine, dense.combine, (acts[order], rows, starts, x)),
        (cpu.dots, dense.dots, (x, table, entries.starts, entries.latents)),
    ):
        ours, reference, arguments = case
        wide = [a.double() if a.is_floating_point() else a for a in arguments]
        expected = reference(*wide)
        error = (ours(*arguments) - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max()


def test_kernels_are_chosen_by_device_and_by_the_share_that_is_active():
    table = torch.empty(100, 8)
    assert kernels_for(table, entries=20 * 10, rows=10) is cpu
    assert kernels_for(table, entries=20 * 10 + 1, rows=10) is dense
    assert kernels_for(table.to("meta"), entries=10, rows=10) is dense


def test_on_avx512_the_product_is_onednns_and_right(monkeypatch):
    source = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=source) for s in ((33, 48), (70, 48), (70,)))
    expected = (x.double() @ weight.double().T + bias).float()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with flop_counter() as counter:
        torch.testing.assert_close(affine(x, weight, bias), expected)
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert counts == {"mkldnn._linear_pointwise": 2 * 33 * 48 * 70}
    assert affine(x[:0], weight, bias).shape == (0, 70)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with flop_counter() as counter:
        torch.testing.assert_close(affine(x, weight, bias), expected)
    assert counter.get_total_flops() == 2 * 33 * 48 * 70
    assert affine(x[:0], weight, bias).shape == (0, 70)
    wide = affine(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(wide.float(), expected)


# ---- the k largest ----------------------------------------------------------------------------


@given(
    rows=st.integers(0, 4),
    n=st.sampled_from([1, 7, 64, 96, 100, 256, 1000, 1024]),
    k=st.integers(0, 40),
    seed=st.integers(0, 9),
    levels=st.sampled_from([2, 10, 10**6]),
)
@settings(deadline=None, max_examples=150)
def test_top_k_returns_the_k_largest_whatever_the_shape(rows, n, k, seed, levels):
    """With few levels most values are equal: which are taken is free, what they are is not."""
    k = min(k, n)
    source = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (rows, n), generator=source).float()
    found, where = top_k(values, k)
    assert torch.equal(values.gather(1, where), found)
    assert all(len(set(row.tolist())) == k for row in where)
    expected = values.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(found.sort(dim=1, descending=True).values, expected)


def test_top_k_takes_a_nan_for_the_largest_as_torch_does():
    values = torch.zeros(2, COLUMNS_PER_K * 8)
    values[1, 77] = torch.nan
    found, where = top_k(values, 2)
    assert 77 in where[1]
    assert found[1].isnan().any()
    assert not found[0].isnan().any()


def test_two_stages_are_really_taken():
    sizes = {(4096, 32): 16, (12288, 64): 16, (1024, 16): 8, (1024, 65): 1, (1001, 1): 1}
    assert {shape: group_size(*shape) for shape in sizes} == sizes
