"""Every kind of SAE against a naive dense version of its definition, and on known directions."""

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from groupsae.cost.counter import flop_counter
from groupsae.runtime.errors import UserError
from groupsae.sae.base import GlobalBatch, active_latents, firings
from groupsae.sae.checks import check_count, check_positive, check_share
from groupsae.training.group import GroupSAE
from groupsae.training.optim import Adam
from tests.helpers.saes import FAMILY, generator, make, trained

EXACT = {"rtol": 1e-11, "atol": 1e-13}  # float64, sums in another order
KINDS = list(FAMILY)
ONE = torch.tensor(1.0, dtype=torch.float64)


def make_x(rows: int = 40, seed: int = 2) -> torch.Tensor:
    return torch.randn(rows, 6, generator=generator(seed), dtype=torch.float64)


def batch(total_variance: torch.Tensor = ONE, *more: Any) -> GlobalBatch:
    """Return a batch without dead latents."""
    return GlobalBatch(total_variance, torch.zeros(0, dtype=torch.int64), *more)


def dense(sae: Any, latents: Any, rows: int) -> torch.Tensor:
    """Return latents as a matrix, one entry at a time."""
    if isinstance(latents, torch.Tensor):
        return latents
    out = torch.zeros(rows, sae.d_sae, dtype=torch.float64)
    for row in range(rows):
        if latents.starts is None:
            acts, indices = latents.acts[row], latents.indices[row]
        else:
            mine = slice(*latents.starts[row : row + 2].tolist())
            acts, indices = latents.acts[mine], latents.indices[mine]
        for act, index in zip(acts, indices, strict=True):
            out[row, index] += act.detach()
    return out


def definition(kind: str, sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the latents of inference from the formula of each kind."""
    shared = (x - sae.b_dec) @ sae.W_enc.T
    if kind == "gated":
        open_gate = shared + sae.b_gate > 0
        return torch.where(open_gate, (shared * sae.r_mag.exp() + sae.b_mag).clamp_min(0), 0)
    pre = shared + sae.b_enc
    if kind == "topk":
        least = pre.sort(dim=1, descending=True).values[:, sae.k - 1 : sae.k]
        return torch.where(pre >= least, pre, 0).clamp_min(0)
    least = {
        "relu": 0.0,
        "jumprelu": getattr(sae, "log_threshold", torch.zeros(())).exp(),
    }.get(kind, 0.4)
    return torch.where(pre > least, pre, 0)


# ---- inference ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_encode_is_the_definition(kind: str) -> None:
    sae, x = trained(kind), make_x()
    latents, expected = sae.encode(x), definition(kind, sae, x)
    assert 0 < (expected > 0).sum() < expected.numel()
    assert (latents.acts >= 0).all()
    torch.testing.assert_close(dense(sae, latents, len(x)), expected, **EXACT)
    assert latents.acts.shape[1] == (expected > 0).sum(1).max()


@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_decode_dense_agree(kind: str) -> None:
    sae, x = trained(kind), make_x()
    expected = definition(kind, sae, x) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected, **EXACT)
    torch.testing.assert_close(sae.decode_dense(definition(kind, sae, x)), expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_latents_do_not_depend_on_its_neighbours_nor_on_the_mode(kind: str) -> None:
    sae, x = trained(kind), make_x()
    together = dense(sae, sae.train().encode(x), len(x))
    alone = torch.cat([dense(sae, sae.eval().encode(row[None]), 1) for row in x])
    torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_latents(kind: str) -> None:
    sae = trained(kind)
    assert len(sae.encode(make_x(0)).acts) == 0
    output = sae(make_x(0), batch(ONE, 0.5, torch.tensor(0.0)))
    assert sum(output.losses.values()) == 0
    sum(output.losses.values()).backward()


def test_active_latents_has_as_many_columns_as_the_fullest_row() -> None:
    acts = torch.tensor([[0.0, 2, 0, 1], [0, 0, 0, 3]])
    latents = active_latents(acts)
    assert latents.acts.shape == (2, 2)
    assert active_latents(torch.zeros(3, 4)).acts.shape == (3, 1)


# ---- training -------------------------------------------------------------------------------


def reference(kind: str, sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the loss terms from their formulas, dense and differentiable."""
    shared = (x - sae.b_dec) @ sae.W_enc.T
    if kind == "gated":
        gate = (shared + sae.b_gate).relu()
        acts = (shared * sae.r_mag.exp() + sae.b_mag).relu() * (gate > 0)
        through = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        return {
            "fvu": (x - acts @ sae.W_dec - sae.b_dec).square().sum() / 7,
            "sparsity": 0.3 * gate.sum() / 7,
            "gate": (x - through).square().sum() / 7,
        }
    pre = shared + sae.b_enc
    if kind == "relu":
        acts = pre.relu()
        error = (x - acts @ sae.W_dec - sae.b_dec).square().sum() / 7
        return {"fvu": error, "sparsity": 0.3 * (acts * sae.W_dec.norm(dim=1)).sum() / 7}
    ranked = pre.flatten().argsort(descending=True)
    mask = torch.zeros_like(pre).flatten()
    mask[ranked[: sae.k * len(x)]] = 1  # of the whole batch
    acts = pre.relu() * mask.view_as(pre)
    ends = getattr(sae, "sizes", [24])
    squares = [(x - acts[:, :m] @ sae.W_dec[:m] - sae.b_dec).square().sum() / 7 for m in ends]
    if kind == "batchtopk":
        return {"fvu": squares[-1]}
    return {"fvu": squares[-1], "nested": sum(squares[:-1])}


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka", "relu", "gated"])
def test_losses_and_gradients_are_those_of_the_dense_formula(kind: str) -> None:
    sae, x = trained(kind), make_x()
    output, expected = sae(x, batch(7 * ONE)), reference(kind, sae, x)
    assert output.losses.keys() == expected.keys() <= set(sae.terms)
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value, **EXACT)
    parameters = dict(sae.named_parameters())
    ours = torch.autograd.grad(sum(output.losses.values()), list(parameters.values()))
    theirs = torch.autograd.grad(sum(expected.values()), list(parameters.values()))
    for name, mine, its in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_latents_found_in_bfloat16_are_those_of_float32_with_its_values(kind: str) -> None:
    """All but one in a thousand: rounding swaps those that lie closer than it reaches."""
    size = {"d_model": 64, "expansion": 16, "k": 8}
    exact, low = make(kind, **size), make(kind, **size, selection="bfloat16")
    low.load_state_dict(exact.state_dict())
    x = torch.randn(512, 64, generator=generator(3))
    with torch.no_grad():
        x[:] += exact.b_dec
    outputs = exact(x, batch(ONE.float())), low(x, batch(ONE.float()))
    found, expected = (dense(exact, o.latents, len(x)) for o in reversed(outputs))
    same = (found > 0) & (expected > 0)
    assert same.sum() >= 0.999 * (expected > 0).sum()
    assert (found > 0).sum() == (expected > 0).sum()
    torch.testing.assert_close(found[same], expected[same], rtol=1e-5, atol=1e-6)
    assert outputs[1].reconstruction.dtype == torch.float32
    gradients = [
        torch.autograd.grad(sum(o.losses.values()), [*sae.parameters()])
        for sae, o in zip((exact, low), outputs, strict=True)
    ]
    for mine, its in zip(*gradients, strict=True):
        assert (mine - its).norm() <= 0.03 * its.norm()


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_auxk_found_in_bfloat16_has_the_values_of_float32(kind: str) -> None:
    size = {"d_model": 64, "expansion": 16, "k": 8}
    exact, low = make(kind, **size), make(kind, **size, selection="bfloat16")
    x, dead = torch.randn(64, 64, generator=generator(3)), torch.arange(0, 1000, 40)
    auxk = [sae(x, GlobalBatch(ONE.float(), dead)).losses["auxk"] for sae in (exact, low)]
    torch.testing.assert_close(*auxk, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reconstruction_is_that_of_the_latents_given(kind: str) -> None:
    sae, x = trained(kind), make_x()
    output = sae(x, batch())
    acts = dense(sae, output.latents, len(x))
    assert (acts > 0).any()
    torch.testing.assert_close(
        output.reconstruction.detach(), sae.decode_dense(acts).detach(), **EXACT
    )


def test_auxk_of_batchtopk_is_that_of_topk_for_the_same_error() -> None:
    sae, x = trained("batchtopk"), make_x()
    dead = torch.tensor([1, 4, 20])
    output = sae(x, GlobalBatch(7 * ONE, dead))
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()[:, dead]
    error = x - output.reconstruction - pre @ sae.W_dec[dead]  # 3 dead of at most 3
    torch.testing.assert_close(output.losses["auxk"], error.square().sum() / 7 / 32, **EXACT)


def test_rows_share_out_the_active_latents_of_a_batch() -> None:
    sae, x = trained("batchtopk"), make_x()
    x[:5] *= 10
    counts = (dense(sae, sae(x, batch()).latents, len(x)) > 0).sum(1)
    assert counts.sum() == sae.k * len(x)
    assert counts[:5].float().mean() > 1.5 * counts[5:].float().mean()


def test_the_threshold_starts_at_the_smallest_kept_latent_and_then_follows_it() -> None:
    sae, x = trained("batchtopk"), make_x()
    kept = [sae(part, batch()).latents.acts for part in (x, 2 * x)]
    smallest = [acts[acts > 0].min().item() for acts in kept]
    sae.threshold.zero_()
    for part in (x, 2 * x):
        sae(part, batch())
    assert sae.threshold.item() == pytest.approx(0.95 * smallest[0] + 0.05 * smallest[1])
    before = sae.threshold.clone()
    sae.eval()(x, batch())
    sae.train()(x[:0], batch())
    assert sae.threshold == before
    sae.b_enc.data[:] = -100.0  # nothing is positive: there is nothing to follow
    sae(x, batch())
    assert sae.threshold == before


def test_the_threshold_makes_as_many_latents_active_as_training_did() -> None:
    sae = trained("batchtopk")
    sae.threshold.zero_()
    for seed in range(60):
        sae(make_x(200, seed), batch())
    l0 = (sae.encode(make_x(4000, 99)).acts > 0).sum() / 4000
    assert l0 == pytest.approx(sae.k, rel=0.05)


def test_the_gradients_of_jumprelu_are_those_of_the_smoothed_step() -> None:
    """By hand: rectangular kernel around the threshold (arXiv 2407.14435, equations 11 and 12)."""
    sae, x = trained("jumprelu", bandwidth=0.5), make_x()
    output = sae(x, batch(7 * ONE))
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    theta = sae.log_threshold.exp()
    active = (pre > theta).double()
    error = (pre * active) @ sae.W_dec + sae.b_dec - x
    l0 = active.sum() / len(x)
    torch.testing.assert_close(output.losses["fvu"], error.square().sum() / 7, **EXACT)
    torch.testing.assert_close(output.losses["sparsity"], (l0 / 3 - 1).square(), **EXACT)
    sum(output.losses.values()).backward()
    near = (pre - theta).abs() < 0.25
    assert near.any()
    of_acts = 2 * error @ sae.W_dec.T / 7
    of_active = 2 * (l0 / 3 - 1) / 3 / len(x)
    by_hand = (near * -(theta * of_acts + of_active) / 0.5).sum(0) * theta
    torch.testing.assert_close(sae.log_threshold.grad, by_hand, **EXACT)
    torch.testing.assert_close(sae.b_enc.grad, (of_acts * active).sum(0), **EXACT)
    through = (of_acts * active).T @ (x - sae.b_dec)  # to the encoder; the decoder's is plain
    torch.testing.assert_close(sae.W_enc.grad, through, **EXACT)
    torch.testing.assert_close(sae.W_dec.grad, 2 / 7 * (pre * active).T @ error, **EXACT)
    to_bias = 2 / 7 * error.sum(0) - (of_acts * active).sum(0) @ sae.W_enc
    torch.testing.assert_close(sae.b_dec.grad, to_bias, **EXACT)


def test_folding_norms_changes_neither_reconstruction_nor_loss_of_relu() -> None:
    sae, x = trained("relu"), make_x()
    with torch.no_grad():
        sae.W_dec *= torch.rand(24, 1, generator=generator(5), dtype=torch.float64) + 0.5
    before = sae(x, batch())
    sae.normalize_decoder()
    after = sae(x, batch())
    torch.testing.assert_close(after.reconstruction, before.reconstruction, **EXACT)
    torch.testing.assert_close(after.losses["sparsity"], before.losses["sparsity"], **EXACT)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), **EXACT)


def test_the_gradient_of_relu_keeps_its_part_along_the_latents() -> None:
    sae, x = trained("relu"), make_x()
    sum(sae(x, batch()).losses.values()).backward()
    before = sae.W_dec.grad.clone()
    sae.project_gradient()
    assert torch.equal(sae.W_dec.grad, before)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu", "gated"])
def test_halves_of_a_batch_add_up_where_rows_are_chosen_alone(kind: str) -> None:
    """Two processes: each has the global variance under its loss, and knows its share.

    The only other thing that they tell each other is how many latents were active.
    """
    sae, x = trained(kind), make_x()
    whole = sae(x, batch(7 * ONE))
    _, active = firings(whole.latents, sae.d_sae)
    parts = [(x[:10], 0.25), (x[10:], 0.75)]
    halves = [
        sae(part, batch(7 * ONE, 1.0, share, lambda _mine: active.double())).losses
        for part, share in parts
    ]
    for name, value in whole.losses.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], value, **EXACT)
    weights = list(sae.parameters())
    expected = torch.autograd.grad(sum(whole.losses.values()), weights)
    found = torch.autograd.grad(sum(v for each in halves for v in each.values()), weights)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, **EXACT)


# ---- schedules ------------------------------------------------------------------------------


def test_k_goes_over_from_its_start_to_its_end() -> None:
    sae = make("topk", k=2, k_start=10, sparsity_warmup=0.5)
    assert [sae.k_at(p) for p in (0.0, 0.125, 0.25, 0.5, 1.0)] == [10, 8, 6, 2, 2]
    x = make_x().float()
    for progress, k in ((0.0, 10), (1.0, 2)):
        assert sae(x, batch(ONE.float(), progress)).latents.acts.shape == (40, k)
    assert sae.encode(x).acts.shape == (40, 2)
    assert make("topk", k=2, sparsity_warmup=0.5).k_at(0.1) == 2


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_penalties_rise_from_zero_to_their_full_weight(kind: str) -> None:
    sae, x = trained(kind, sparsity_warmup=0.4), make_x()
    at = [
        sae(x, batch(ONE, progress)).losses["sparsity"].item() for progress in (0.0, 0.1, 0.4, 1.0)
    ]
    assert at[0] == 0
    assert at[1:3] == pytest.approx([at[3] / 4, at[3]])


# ---- start, cost, bad values ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_starts_and_stays_at_unit_norm(kind: str) -> None:
    for tied in (True, False):
        sae = make(kind, tied=tied)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
        assert torch.equal(sae.W_enc, sae.W_dec) == tied
        torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_what_the_counter_sees(kind: str) -> None:
    """Products with a single vector (the biases), paid once for a batch, are not counted."""
    sae = make(kind, d_model=16, auxk_alpha=0) if "topk" in kind else make(kind, d_model=16)
    x = torch.randn(64, 16, generator=generator())
    with flop_counter() as counter:
        sum(sae(x, batch(ONE.float())).losses.values()).backward()
    once = 0 if kind != "relu" else counter.get_total_flops() - 64 * sae.training_flops()
    assert 0 <= once <= 6 * sae.d_sae  # the penalty's product with the norms, and its gradients
    assert counter.get_total_flops() - once == 64 * sae.training_flops()
    with FlopCounterMode(display=False) as dense_only:
        sae.decode_dense(torch.zeros(64, sae.d_sae))
    encoding = 2 * 16 * sae.d_sae
    assert encoding < sae.inference_flops() <= encoding + dense_only.get_total_flops() // 64


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("topk", {"expansion": None}, "sae.expansion is None and sae.d_sae is None"),
        ("topk", {"d_sae": 9}, "sae.expansion is 4 and sae.d_sae is 9"),
        ("topk", {"expansion": None, "d_sae": 0}, "sae.d_sae is 0"),
        ("topk", {"k_start": 25}, "sae.k_start is 25.* 24 latents"),
        ("topk", {"sparsity_warmup": 1.5}, "sae.sparsity_warmup is 1.5.* from 0 to 1"),
        ("batchtopk", {"threshold_momentum": -1}, "sae.threshold_momentum is -1"),
        ("matryoshka", {"prefixes": [0.5]}, "sae.prefixes is .0.5.*end in 1"),
        ("matryoshka", {"prefixes": [0.5, 0.5, 1]}, "sae.prefixes"),
        ("matryoshka", {"prefixes": [0.001, 1]}, "none of them empty"),
        ("matryoshka", {"prefixes": []}, "sae.prefixes"),
        ("jumprelu", {"target_l0": 25}, "sae.target_l0 is 25.* 24 latents"),
        ("jumprelu", {"threshold": 0}, "sae.threshold is 0"),
        ("jumprelu", {"bandwidth": -1}, "sae.bandwidth is -1"),
        ("relu", {"l1_coefficient": 0}, "sae.l1_coefficient is 0"),
        ("gated", {"l1_coefficient": float("nan")}, "sae.l1_coefficient is nan"),
        ("relu", {"l1_coefficient": float("inf")}, "sae.l1_coefficient is inf"),
        ("topk", {"expansion": float("nan")}, "sae.expansion is nan"),
        ("topk", {"auxk_alpha": -1}, "sae.auxk_alpha is -1"),
        ("topk", {"auxk_alpha": float("nan")}, "sae.auxk_alpha is nan"),
        ("topk", {"auxk_share": 0}, "sae.auxk_share is 0"),
        ("topk", {"selection": "float16"}, "sae.selection is 'float16': use float32 or bfloat16"),
        ("matryoshka", {"prefixes": ["a", 1]}, "sae.prefixes is 'a'"),
    ],
)
def test_impossible_values_are_refused(kind: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(kind, **changes)


def test_values_of_another_type_are_refused() -> None:
    """Asked of the checks themselves: in the tests, types are checked before them."""
    for value in (2.5, "a", True, None, 0):
        with pytest.raises(UserError, match=f"sae.k is {value!r}.* from 1 up to the 24 latents"):
            check_count("k", value, 24)
    for value in ("x", None, float("nan"), 2):
        with pytest.raises(UserError, match="sae.momentum is .* from 0 to 1"):
            check_share("momentum", value)
    with pytest.raises(UserError, match="sae.l1_coefficient is None"):
        check_positive(l1_coefficient=None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_needs_no_more_than_the_sizes(kind: str) -> None:
    size = {"k": 4} if "topk" in kind or kind == "matryoshka" else {}
    sae = FAMILY[kind][0](d_model=8, d_sae=256, **size)
    x = torch.randn(5, 8)
    assert sae.decode(sae.encode(x)).shape == x.shape


def test_a_number_of_latents_takes_the_place_of_the_factor() -> None:
    assert make("relu", expansion=None, d_sae=37).W_dec.shape == (37, 6)


# ---- what it is for -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_dictionary_is_recovered_by_the_recipe(kind: str) -> None:
    """Group step, fused Adam, projection, clipping, normalisation: as a run does them."""
    d_model, num_true, active, rows, steps = 32, 64, 3, 256, 300
    source = generator(4)
    dictionary = torch.randn(num_true, d_model, generator=source)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    architecture, values = FAMILY[kind]
    strength = {"l1_coefficient": 0.6} if kind == "gated" else {}
    group = GroupSAE(
        name="g", layers=[0], norm_factors={0: 0.5}, d_model=d_model, dead_after=20 * rows,
        sae=functools.partial(architecture, expansion=4, **(values | strength)),
        optim=Adam(base_lr=1e-2, base_d_sae=128),
        b_dec_start="zero", nonfinite="stop", seed=0,
    )  # fmt: skip
    optimizer = group.configure_optimizers()
    layers = torch.zeros(rows, dtype=torch.int64)
    for step in range(steps):
        chosen = torch.randint(num_true, (rows, active), generator=source)
        weights = torch.rand(rows, active, generator=source) + 0.5
        x = nn.functional.embedding_bag(chosen, dictionary, mode="sum", per_sample_weights=weights)
        optimizer.zero_grad()
        loss = group.step(
            x, layers, group.moments(x, layers), int(group.dead().sum()), step / steps
        )
        group.count_dead(group.fired > 0)
        loss.backward()
        optimizer.step()
    found = (dictionary @ group.sae.directions().T).max(dim=1).values
    assert found.mean() > 0.9, f"mean max cosine {found.mean():.3f}, loss {loss.item():.3f}"
