"""Biases and low-rank maps of single layers, around every kind of SAE, against their formulas."""

import copy
from typing import Any

import pytest
import torch

from groupsae.cost.counter import flop_counter
from groupsae.runtime.errors import UserError
from groupsae.sae.base import GlobalBatch
from tests.helpers.saes import FAMILY, generator, make, trained
from tests.sae.test_sae_family import definition, dense

EXACT = {"rtol": 1e-11, "atol": 1e-13}
KINDS, OWN = list(FAMILY), [("per_layer", 0), ("shared", 2), ("per_layer", 2)]
LAYERS, SIZES = [3, 4, 7], [15, 0, 25]  # a batch without a row of layer 4
DEAD = torch.tensor([1, 4, 20])
forms = pytest.mark.parametrize(("bias", "rank"), OWN)
kinds = pytest.mark.parametrize("kind", KINDS)


def aware(kind: str, bias: str, rank: int, noise: float = 0.3, **changes: Any) -> Any:
    """Return a layer-aware SAE in float64, away from its start."""
    return trained(kind, noise, layer_bias=bias, layer_rank=rank, layers=LAYERS, **changes)


def rows(seed: int = 2) -> torch.Tensor:
    return torch.randn(sum(SIZES), 6, generator=generator(seed), dtype=torch.float64)


def frame(dead: torch.Tensor = DEAD[:0], dtype: Any = torch.float64) -> GlobalBatch:
    return GlobalBatch(torch.tensor(7.0, dtype=dtype), dead, sizes=SIZES)


def by_formula(kind: str, sae: Any, layer: int, x: torch.Tensor) -> tuple[Any, Any]:
    """Return latents of inference and reconstruction, from the formulas of the module."""
    own, eye = sae.maps.of(layer), torch.eye(6, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    b_dec = sae.b_dec + (zero if own.b_dec is None else own.b_dec)
    enter, leave = (
        eye + (zero if first is None else first @ second)
        for first, second in ((own.A, own.B), (own.C, own.D))
    )
    plain = make(kind).double()
    plain.load_state_dict({n: t for n, t in sae.state_dict().items() if not n.startswith("maps.")})
    with torch.no_grad():
        plain.b_dec.zero_()
        if own.b_enc is not None:
            plain.shift_pre_acts(own.b_enc)
    latents = definition(kind, plain, (x - b_dec) @ enter)
    return latents, latents @ sae.W_dec @ leave + b_dec


def norms(kind: str, sae: Any, layer: int) -> torch.Tensor:
    """Return what the latents of a layer are multiplied by: where that changes no choice."""
    own, decoder = sae.maps.of(layer), sae.W_dec.detach()
    if own.C is None or kind in ("topk", "batchtopk", "matryoshka"):
        return torch.ones(24, dtype=torch.float64)
    return (decoder + decoder @ own.C.detach() @ own.D.detach()).norm(dim=1)


@kinds
@forms
def test_at_zero_a_step_is_that_of_the_plain_sae_bit_for_bit(
    kind: str, bias: str, rank: int
) -> None:
    plain = aware(kind, "shared", 0).float()
    sae = make(kind, layer_bias=bias, layer_rank=rank, layers=LAYERS)
    fresh = {name: tensor.clone() for name, tensor in sae.maps.state_dict().items()}
    assert all(not fresh[name].any() for name in fresh.keys() - {"A", "C"})
    sae.load_state_dict(plain.state_dict(), strict=False)
    dead = DEAD if "auxk" in sae.terms else DEAD[:0]
    x, gradients = rows().float(), []
    outputs = [each(x, frame(dead, torch.float32)) for each in (plain, sae)]
    assert outputs[0].losses.keys() == outputs[1].losses.keys()
    for each, output in zip((plain, sae), outputs, strict=True):
        sum(output.losses.values()).backward()
        gradients.append({n: p.grad for n, p in each.named_parameters()})
    assert torch.equal(outputs[0].reconstruction, outputs[1].reconstruction)
    for name, loss in outputs[0].losses.items():
        assert torch.equal(outputs[1].losses[name], loss), name
    for name, gradient in gradients[0].items():
        same = torch.equal(gradients[1][name], gradient)
        # where maps need the gradient of their input, that of b_dec goes through it, too
        assert same or (name == "b_dec" and rank), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@kinds
@forms
def test_on_a_layer_it_is_a_plain_sae(kind: str, bias: str, rank: int) -> None:
    sae, x = aware(kind, bias, rank), rows()
    for layer in LAYERS:
        plain, (latents, x_hat) = sae.at(layer), by_formula(kind, sae, layer, x)
        assert plain.maps is None
        assert 0 < (latents > 0).sum() < latents.numel()
        found = dense(plain, plain.encode(x), len(x)) / norms(kind, sae, layer)
        torch.testing.assert_close(found, latents, **EXACT)
        torch.testing.assert_close(plain.decode(plain.encode(x)), x_hat, **EXACT)
        shares = plain.W_enc is sae.W_enc, plain.W_dec is sae.W_dec
        assert shares == (rank == 0, rank == 0)
        assert plain.b_dec is not sae.b_dec
    assert make(kind).at(5).maps is None


@kinds
@forms
def test_a_training_batch_is_what_each_layer_computes(kind: str, bias: str, rank: int) -> None:
    sae, x = aware(kind, bias, rank), rows()
    output = sae(x, frame())
    acts, start = dense(sae, output.latents, len(x)), 0
    for layer, size in zip(LAYERS, SIZES, strict=True):
        mine, plain, scale = slice(start, start + size), sae.at(layer), norms(kind, sae, layer)
        if kind not in ("batchtopk", "matryoshka"):  # in training they choose over the batch
            expected = dense(plain, plain.encode(x[mine]), size) / scale
            torch.testing.assert_close(acts[mine].detach(), expected, **EXACT)
        x_hat = plain.decode_dense(acts[mine].detach() * scale)
        torch.testing.assert_close(output.reconstruction[mine].detach(), x_hat, **EXACT)
        start += size
    fvu = (x - output.reconstruction).square().sum() / 7
    torch.testing.assert_close(output.losses["fvu"], fvu, **EXACT)


@kinds
@forms
def test_gradients_are_finite_differences(kind: str, bias: str, rank: int) -> None:
    """But for what a loss leaves out on purpose: the decoded gate and AuxK are tested below."""
    sae, x = aware(kind, bias, rank), rows()

    def loss() -> torch.Tensor:
        losses = sae.eval()(x, frame()).losses
        return sum(value for name, value in losses.items() if name != "gate")  # type: ignore

    parameters = {n: p for n, p in sae.named_parameters() if n not in ("log_threshold",)}
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for number, (name, parameter) in enumerate(parameters.items()):
        along = torch.randn(parameter.shape, generator=generator(number), dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * along
                values.append(float(loss()))
                parameter -= step * along
        found = (gradients[number] * along).sum().item()
        assert found == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7), name
        assert found != 0, name


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
@forms
def test_auxk_uses_the_maps_of_the_layer(kind: str, bias: str, rank: int) -> None:
    sae, x = aware(kind, bias, rank), rows()
    output, start, errors = sae(x, frame(DEAD)), 0, []
    parameters = dict(sae.named_parameters())
    for layer, size in zip(LAYERS, SIZES, strict=True):
        own, part = sae.maps.of(layer), x[start : start + size]
        error = part - output.reconstruction[start : start + size].detach()
        h = part - sae.b_dec - (0 if own.b_dec is None else own.b_dec)
        h = h if own.A is None else h + h @ own.A @ own.B
        pre = h @ sae.W_enc.T + sae.b_enc + (0 if own.b_enc is None else own.b_enc)
        e_hat = pre[:, DEAD].relu() @ sae.W_dec[DEAD]  # 3 dead of at most 3
        e_hat = e_hat if own.C is None else e_hat + e_hat @ own.C @ own.D
        errors.append((error - e_hat).square().sum())
        start += size
    expected = sum(errors) / 7 / 32
    torch.testing.assert_close(output.losses["auxk"], expected, **EXACT)
    ours, theirs = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for loss in (output.losses["auxk"], expected)
    )
    for name, mine, its in zip(parameters, ours, theirs, strict=True):
        if its is None:
            assert mine is None or not mine.any(), name
        else:
            torch.testing.assert_close(mine, its, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@forms
def test_decoding_the_gate_trains_no_decoder(bias: str, rank: int) -> None:
    sae, x = aware("gated", bias, rank), rows()
    sae(x, frame()).losses["gate"].backward()
    trained = {name for name, p in sae.named_parameters() if p.grad is not None and p.grad.any()}
    own = {"maps.b_dec", "maps.b_enc"} if bias == "per_layer" else set()
    maps = {"maps.A", "maps.B"} if rank else set()
    assert trained == {"W_enc", "b_dec", "b_gate"} | own | maps


@forms
def test_bfloat16_finds_latents_with_the_values_of_float32(bias: str, rank: int) -> None:
    size = {"d_model": 64, "expansion": 16, "k": 8, "layer_bias": bias, "layer_rank": rank}
    exact, low = (
        make("topk", **size, layers=LAYERS, selection=each) for each in ("float32", "bfloat16")
    )
    with torch.no_grad():
        for parameter in exact.maps.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator(5))
    low.load_state_dict(exact.state_dict())
    x = torch.randn(sum(SIZES), 64, generator=generator(3))
    outputs = [sae(x, frame(dtype=torch.float32)) for sae in (exact, low)]
    found, expected = (
        dense(sae, o.latents, 40).float() for sae, o in ((low, outputs[1]), (exact, outputs[0]))
    )
    same = (found > 0) & (expected > 0)
    assert same.sum() >= 0.99 * (expected > 0).sum()
    torch.testing.assert_close(found[same], expected[same], rtol=1e-5, atol=1e-5)


def test_folding_norms_of_relu_changes_no_layer() -> None:
    sae, x = aware("relu", "per_layer", 2), rows()
    with torch.no_grad():
        sae.W_dec *= torch.rand(24, 1, generator=generator(1), dtype=torch.float64) + 0.5
    before = [copy.deepcopy(sae.at(layer)) for layer in LAYERS]
    sae.normalize_decoder()
    for plain, layer in zip(before, LAYERS, strict=True):
        after = sae.at(layer)
        x_hats = [each.decode(each.encode(x)) for each in (plain, after)]
        torch.testing.assert_close(*x_hats, **EXACT)


@kinds
@forms
def test_planned_flops_are_counted(kind: str, bias: str, rank: int) -> None:
    sae = make(kind, d_model=16, expansion=4, layer_bias=bias, layer_rank=rank, layers=LAYERS)
    x = torch.randn(40, 16, generator=generator())
    with flop_counter() as counter:
        sum(sae.eval()(x, frame(dtype=torch.float32)).losses.values()).backward()
    assert counter.get_total_flops() == 40 * sae.training_flops()
    plain = make(kind, d_model=16, expansion=4)
    assert (sae.training_flops() > plain.training_flops()) == (rank > 0)
    assert sae.inference_flops() == plain.inference_flops()


def test_one_layer_has_nothing_of_its_own_and_weights_start_as_ever() -> None:
    plain, alone, group = (
        make("topk", **more)
        for more in (
            {},
            {"layer_bias": "per_layer", "layer_rank": 2, "layers": [5]},
            {"layer_bias": "per_layer", "layer_rank": 2, "layers": LAYERS},
        )
    )
    assert alone.maps is None
    for name, tensor in plain.state_dict().items():
        assert torch.equal(alone.state_dict()[name], tensor)
        assert torch.equal(group.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layer_bias": "own"}, "sae.layer_bias is 'own': use shared, per_layer"),
        ({"layer_rank": -1}, "sae.layer_rank is -1; it must be an integer from 0 to the 6"),
        ({"layer_rank": 7}, "sae.layer_rank is 7"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make("topk", **values)
