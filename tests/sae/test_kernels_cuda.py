"""The Triton programs against float64 loops: in Triton's interpreter, and on a GPU (-m gpu).

Triton reads TRITON_INTERPRET when it is first imported, for its own functions as for ours, and
torch may have imported it before any fixture runs. So the interpreter gets a process of its own:
one ordinary test runs this file again there.
"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.sae import base
from groupsae.sae.base import GlobalBatch
from groupsae.sae.kernels import cuda, dense, dispatch
from tests.helpers.saes import trained

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COUNTS = {  # entries of the segments
    "random": [3, 0, 70, 64, 65],
    "one each": [1] * 4,
    "one hot": [0, 2, 700, 0],
    "all empty": [0, 0, 0],
    "no segments": [],
}

NEEDED = pytest.mark.skipif(not cuda.available(), reason="needs Triton")


def on_device(test):
    test = NEEDED(test)
    if INTERPRETED:
        return test
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test)
    )


def every_case(test):
    """Run for stripes of several widths, the last one ragged; for a row in half a block once."""
    cases = [(140, dtype) for dtype in DTYPES] + [(7, torch.float32)]
    test = pytest.mark.parametrize(("d", "dtype"), cases, ids=str)(test)
    return pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)(on_device(test))


def make_entries(counts, dtype, n=11, seed=0):
    """Return weights, picked rows (repeats among them) and starts."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *counts]).cumsum(0)
    weights = torch.randn(int(starts[-1]), generator=generator, dtype=torch.float64).to(dtype)
    picked = torch.randint(n, (int(starts[-1]),), generator=generator)
    return weights.to(DEVICE), picked.to(DEVICE), starts.to(DEVICE)


def make_rows(rows, d, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def wide(tensor):
    return tensor.cpu().double()


def check(result, expected, magnitude, dtype):
    """Hold |error| to 8 eps of float32 (float64) times the sum of |terms|, and one rounding."""
    assert result.dtype == dtype
    assert result.shape == expected.shape
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = 8 * sums * magnitude + torch.finfo(dtype).eps * expected.abs()
    # float16 has steps of 6e-8 below its normal numbers
    allowed = allowed + (6e-8 if dtype == torch.float16 else 0)
    error = (wide(result) - expected).abs()
    assert (error <= allowed).all(), f"{error.max():.3g}, allowed {allowed.max():.3g}"


def naive_combine(weights, picked, starts, table):
    """Return the sums and those of the absolute terms, one entry at a time."""
    out = torch.zeros(len(starts) - 1, table.shape[1], dtype=torch.float64)
    magnitude = torch.zeros_like(out)
    weights, picked, table = wide(weights), picked.cpu(), wide(table)
    for segment in range(len(out)):
        for entry in range(int(starts[segment]), int(starts[segment + 1])):
            term = weights[entry] * table[picked[entry]]
            out[segment] += term
            magnitude[segment] += term.abs()
    return out, magnitude


def naive_dots(x, table, starts, picked):
    terms = []
    for row in range(len(x)):
        for entry in range(int(starts[row]), int(starts[row + 1])):
            terms.append(wide(x[row]) * wide(table[picked[entry]]))
    terms = torch.stack(terms) if terms else torch.zeros(0, x.shape[1], dtype=torch.float64)
    return terms.sum(dim=1), terms.abs().sum(dim=1)


# ---- combine and dots -----------------------------------------------------------------------


@every_case
def test_combine_adds_up_the_weighted_rows_of_every_segment(counts, d, dtype):
    weights, picked, starts = make_entries(counts, dtype)
    table = make_rows(11, d, dtype)
    result = cuda.combine(weights, picked, starts, table)
    check(result, *naive_combine(weights, picked, starts, table), dtype)


@every_case
def test_dots_multiplies_each_row_with_the_rows_it_picked(counts, d, dtype):
    _, picked, starts = make_entries(counts, dtype)
    x, table = make_rows(len(counts), d, dtype, seed=2), make_rows(11, d, dtype)
    result = cuda.dots(x, table, starts, picked)
    check(result, *naive_dots(x, table, starts, picked), dtype)


@on_device
def test_mixed_types_give_what_torch_gives_their_product():
    weights, picked, starts = make_entries([4, 0, 5], torch.float32)
    table = make_rows(11, 20, torch.bfloat16)
    result = cuda.combine(weights, picked, starts, table)
    check(result, *naive_combine(weights, picked, starts, table), torch.float32)
    x = make_rows(3, 20, torch.float32)
    result = cuda.dots(x, table, starts, picked)
    check(result, *naive_dots(x, table, starts, picked), torch.float32)


@on_device
def test_tensors_may_lie_in_memory_in_any_way():
    # as a sum's gradient does, and what is transposed; indices of 32 bits as well
    _, picked, starts = make_entries([4, 0, 5], torch.float32)
    weights = torch.ones(1, device=DEVICE).expand(9)
    table, x = make_rows(20, 11, torch.float32).T, make_rows(20, 3, torch.float32, seed=2).T
    result = cuda.combine(weights, picked.int(), starts.int(), table)
    check(result, *naive_combine(weights, picked, starts, table), torch.float32)
    result = cuda.dots(x, table, starts.int(), picked.int())
    check(result, *naive_dots(x, table, starts, picked), torch.float32)


@on_device
def test_equal_input_gives_equal_bits():
    weights, picked, starts = make_entries([70, 0, 700], torch.float32)
    x, table = make_rows(3, 150, torch.float32, seed=2), make_rows(11, 150, torch.float32)
    sums, products = [
        [run() for _ in range(2)]
        for run in (
            lambda: cuda.combine(weights, picked, starts, table),
            lambda: cuda.dots(x, table, starts, picked),
        )
    ]
    assert torch.equal(*sums)
    assert torch.equal(*products)


@on_device
def test_a_hot_latent_loses_less_to_rounding_than_in_one_running_sum():
    ones = torch.full((20_000,), 0.1, device=DEVICE)
    starts = torch.tensor([0, len(ones)], device=DEVICE)
    picked = torch.zeros_like(ones, dtype=torch.int64)
    result = cuda.combine(ones, picked, starts, torch.ones(1, 16, device=DEVICE))
    exact = wide(ones).sum()
    running = np.add.accumulate(ones.cpu().numpy())[-1]  # one after the other, in float32
    assert (wide(result) - exact).abs().max() < abs(running - exact) / 10


@on_device
@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    d=st.integers(1, 150),
    seed=st.integers(0, 2**31),
)
def test_dots_is_the_gradient_of_combine(counts, d, seed):
    # <combine(w), y> = <w, dots(y)>, whatever w and y are
    weights, picked, starts = make_entries(counts, torch.float64, seed=seed)
    table, y = make_rows(11, d, torch.float64), make_rows(len(counts), d, torch.float64, seed)
    left = (cuda.combine(weights, picked, starts, table) * y).sum()
    right = (weights * cuda.dots(y, table, starts, picked)).sum()
    assert math.isclose(left, right, rel_tol=1e-10, abs_tol=1e-10)


# ---- passes over rows -----------------------------------------------------------------------

SHAPES = [(5, 48), (1, 1), (70, 20), (3, 2500), (0, 16)]


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_rows_takes_away_what_lies_along_directions_of_any_length(shape, dtype):
    gradient, directions = make_rows(*shape, dtype), make_rows(*shape, dtype, seed=2)
    directions[: shape[0] // 2] *= 3
    gradient[1:2], directions[2:3] = 0, 0
    g, w = wide(gradient).clone(), wide(directions).clone()
    along = (g * w).sum(dim=1, keepdim=True) * w
    magnitude = g.abs() + (g * w).abs().sum(dim=1, keepdim=True) * w.abs()
    cuda.project_rows(gradient, directions)
    check(gradient, g - along, magnitude, dtype)
    assert torch.equal(wide(directions), w)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalize_rows_leaves_unit_vectors(shape, dtype):
    directions = make_rows(*shape, dtype)
    directions[1:2] *= 100
    w = wide(directions).clone()
    expected = w / w.norm(dim=1, keepdim=True)
    cuda.normalize_rows(directions)
    check(directions, expected, expected.abs(), dtype)


@on_device
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_a_row_of_zeros_has_no_direction():
    directions = torch.ones(3, 20, device=DEVICE)
    directions[1] = 0
    cuda.normalize_rows(directions)
    assert directions.isnan().any(dim=1).tolist() == [False, True, False]


# ---- in a training step ---------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_a_training_step_is_that_of_the_cpu(kind, monkeypatch):
    """Encoder, decoder, AuxK and the passes over the decoder, with their gradients, in float64."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dead = torch.tensor([1, 4, 7, 9, 11, 14, 15, 20])

    def step(device):
        sae = trained(kind).to(device)
        output = sae(
            x.to(device), GlobalBatch(torch.tensor(7.0, device=device).double(), dead.to(device))
        )
        assert output.losses.keys() >= {"fvu", "auxk"}
        sum(output.losses.values()).backward()
        sae.project_gradient()
        found = {name: p.grad.cpu() for name, p in sae.named_parameters()}
        with torch.no_grad():
            sae.W_dec.mul_(3)
        sae.normalize_decoder()
        return found | {"loss": output.losses["fvu"].detach().cpu(), "W": sae.W_dec.detach().cpu()}

    expected = step("cpu")
    used = []
    for name in ("combine", "dots", "project_rows", "normalize_rows"):
        monkeypatch.setattr(cuda, name, noted(getattr(cuda, name), name, used))
    if INTERPRETED:  # tensors that lie on the CPU
        monkeypatch.setattr(dispatch, "kernels_of", lambda table: cuda)
        monkeypatch.setattr(base, "kernels_of", lambda table: cuda)
    for name, value in step(DEVICE).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-13)
    assert set(used) == {"combine", "dots", "project_rows", "normalize_rows"}


def noted(function, name, used):
    def call(*arguments):
        used.append(name)
        return function(*arguments)

    return call


# ---- without a GPU --------------------------------------------------------------------------


@NEEDED
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_all_of_this_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def test_without_triton_the_module_is_there_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "groupsae.sae.kernels.triton_programs", raising=False)
    cuda.available.cache_clear()
    try:
        importlib.reload(cuda)
        assert not cuda.available()
        assert dispatch.kernels_of(torch.empty(2, 2, device="meta")) is dense
    finally:
        cuda.available.cache_clear()


@pytest.mark.parametrize(
    ("installed", "can"), [("3.5.1", False), ("3.6.0", True), ("3.7.1", True), ("4.0", True)]
)
def test_a_triton_that_was_not_tried_is_not_used(installed, can, monkeypatch):
    monkeypatch.setattr(cuda, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda, "version", lambda name: installed)
    cuda.available.cache_clear()
    try:
        assert cuda.available() == can
    finally:
        cuda.available.cache_clear()
