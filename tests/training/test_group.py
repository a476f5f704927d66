"""The training step of one group, and many groups in one step."""

import contextlib
import math
from functools import partial

import pytest
import torch
from torch import nn

from groupsae.data.draws import draw_layers
from groupsae.runtime.errors import UserError
from groupsae.sae.topk import TopK
from groupsae.training.callbacks.bar import Bar
from groupsae.training.group import GroupSAE
from groupsae.training.readback import Readback
from groupsae.training.suite import GroupSAESuite
from tests.helpers.fits import GROUPS, fit, make_optim, tiny_group, tiny_suite
from tests.helpers.saes import FAMILY
from tests.helpers.waiting import no_waiting, waiting

D_MODEL, K = 8, 3
NORMS = {0: 0.5, 1: 0.25, 2: 2.0, 3: 1.5, 4: 3.0}


def make_sae(*, k=K, **given):
    return TopK(expansion=4, k=k, **given)


def make_group(layers=(1, 3), dead_after=10_000, **changes):
    values = {
        "name": f"layers.{layers[0]}-{layers[-1]}", "layers": list(layers), "norm_factors": NORMS,
        "sae": make_sae, "d_model": D_MODEL, "optim": make_optim(), "dead_after": dead_after,
        "b_dec_start": "zero", "nonfinite": "stop",
        "seed": 0,
    }  # fmt: skip
    return GroupSAE(**(values | changes))


def make_rows(layers=(1, 3), rows=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(rows, D_MODEL, generator=generator)
    return acts, torch.tensor(layers).repeat(rows)[:rows]


def step(group, acts, layers):
    x = group.scaled(acts, layers)
    return group.step(x, layers, group.moments(x, layers), int(group.dead().sum()))


# ---- one step -------------------------------------------------------------------------------


def test_the_loss_is_the_fvu_of_rows_scaled_by_their_own_layers_factor():
    group, (acts, layers) = make_group(), make_rows()
    scaled = torch.stack([x * NORMS[int(i)] for x, i in zip(acts, layers, strict=True)])
    x_hat = group.sae.decode(group.sae.encode(scaled))
    fvu = (scaled - x_hat).square().sum() / (scaled - scaled.mean(0)).square().sum()
    torch.testing.assert_close(step(group, acts, layers), fvu, rtol=1e-5, atol=0)


def test_swapping_the_layers_of_rows_changes_the_loss_unless_the_rows_swap_their_scale():
    group, (acts, layers) = make_group(), make_rows()
    loss, swapped = step(group, acts, layers), 4 - layers
    assert abs(loss - step(group, acts, swapped)) > 0.01 * loss
    scale = torch.tensor([NORMS[int(i)] / NORMS[4 - int(i)] for i in layers]).unsqueeze(1)
    torch.testing.assert_close(step(group, acts * scale, swapped), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("foreign", [0, 2, 4, 7])
def test_a_row_of_a_foreign_layer_never_passes_silently(foreign):
    group, (acts, layers) = make_group(), make_rows()
    layers[5] = foreign
    if foreign > 3:
        with pytest.raises(IndexError):
            step(group, acts, layers)
    else:
        assert step(group, acts, layers).isnan()


def test_norm_factors_of_other_layers_are_not_in_the_group():
    assert make_group().norm_factors.isnan().tolist() == [True, False, True, False]


def test_reconstruct_applies_the_factor_and_undoes_it():
    group, (acts, _) = make_group(), make_rows()
    x_hat, latents = group.reconstruct(acts, 3)
    expected = group.sae.encode(acts * 1.5)
    assert torch.equal(latents.acts, expected.acts)
    torch.testing.assert_close(x_hat, group.sae.decode(expected) / 1.5)
    assert not x_hat.requires_grad


def test_tokens_are_counted_for_each_layer():
    group = make_group()
    for _ in range(2):
        step(group, *make_rows((1, 3, 3), rows=7))
    assert group.tokens_per_layer.tolist() == [0, 6, 0, 8]


def test_moments_of_two_halves_add_up_to_those_of_the_batch():
    group, (acts, layers) = make_group(), make_rows()
    x = group.scaled(acts, layers)
    halves = group.moments(x[:20], layers[:20]) + group.moments(x[20:], layers[20:])
    torch.testing.assert_close(halves, group.moments(x, layers), rtol=1e-12, atol=1e-12)
    # two processes: each part of the loss has the global variance under it
    parts = [
        group.step(x[:20], layers[:20], halves),
        group.step(x[20:], layers[20:], halves),
    ]
    torch.testing.assert_close(sum(parts), step(group, acts, layers), rtol=1e-5, atol=0)


def test_latents_are_dead_after_so_many_tokens_without_firing_and_revive():
    group = make_group(dead_after=100)
    with torch.no_grad():
        group.sae.b_enc[:4] = -1e6
    for expected in (60, 120):
        step(group, *make_rows())
        group.count_dead(group.fired > 0)
        assert group.tokens_since_fired[:4].tolist() == [expected] * 4
        fired = group.fired > 0
        assert not group.tokens_since_fired[fired].any()
    assert group.dead()[:4].all()
    with torch.no_grad():
        group.sae.b_enc[0] = 1e6
    step(group, *make_rows())
    group.count_dead(group.fired > 0)
    assert group.dead()[:4].tolist() == [False, True, True, True]


def test_initial_weights_depend_on_seed_and_layers_only():
    base = make_group().sae.W_dec
    torch.manual_seed(5)
    assert torch.equal(make_group(name="other").sae.W_dec, base)
    assert not torch.equal(make_group(seed=1).sae.W_dec, base)
    assert not torch.equal(make_group(layers=(1, 2)).sae.W_dec, base)


# ---- optimiser ------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_sae", "lr"), [
    (12_288, 2.3094e-4), (16_384, 2.0e-4), (32_768, 1.41421e-4), (4 * 16_384, 1e-4),
])  # fmt: skip
def test_the_learning_rate_follows_the_papers_law(d_sae, lr):
    optim = make_optim(base_lr=2e-4, base_d_sae=2**14)
    assert optim.lr(d_sae) == pytest.approx(lr, rel=1e-5)


def test_every_member_has_a_named_parameter_group_of_its_own():
    suite = suite_of([make_group((0, 1)), make_group((2, 3), sae=lambda **kwargs: TopK(
        expansion=16, k=2, auxk_alpha=0, **kwargs))])  # fmt: skip
    groups = suite.configure_optimizers().param_groups
    assert [g["name"] for g in groups] == ["layers.0-1", "layers.2-3"]
    assert [g["lr"] for g in groups] == [pytest.approx(1e-3), pytest.approx(5e-4)]
    assert all(g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 for g in groups)
    for group, member in zip(groups, suite.members(), strict=True):
        mine, theirs = group["params"], list(member.sae.parameters())
        assert all(a is b for a, b in zip(mine, theirs, strict=True))


def suite_of(members, optim=None):
    suite = GroupSAESuite(
        sae=make_sae, d_model=D_MODEL, optim=optim or make_optim(),
        dead_after=100, b_dec_start="zero", nonfinite="stop",
        seed=0,
    )  # fmt: skip
    suite.groups = nn.ModuleDict({str(i): m for i, m in enumerate(members)})
    return suite


def give_gradients(group, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in group.sae.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def total_norm(group):
    return torch.stack([p.grad.norm() for p in group.sae.parameters()]).norm().item()


def test_clipping_is_by_member_and_leaves_small_gradients_alone():
    members = [make_group((0, 1)), make_group((2,)), make_group((3,))]
    for member, size in zip(members, [100.0, 1e-3, 1.0], strict=True):
        give_gradients(member, size)
    suite = suite_of(members)
    suite.configure_optimizers()
    for member in members:
        member.sae.project_gradient()
    norms = [total_norm(member) for member in members]
    suite.joint.before_update()
    assert norms[0] > 100
    assert total_norm(members[0]) == pytest.approx(1, rel=1e-5)
    assert total_norm(members[1]) == pytest.approx(norms[1], rel=1e-5)
    assert total_norm(members[2]) == pytest.approx(1, rel=1e-5)


def test_the_gradient_is_projected_before_it_is_clipped():
    group = make_group()
    group.configure_optimizers()
    give_gradients(group, 0.01)
    # a huge part along the latents: clipping first would shrink all the rest to nothing
    before = {name: p.grad.clone() for name, p in group.sae.named_parameters()}
    group.sae.W_dec.grad += 1e3 * group.sae.W_dec.detach()
    group.joint.before_update()
    for name, parameter in group.sae.named_parameters():
        expected = before[name]
        if name == "W_dec":
            directions = parameter.detach()
            expected = expected - (expected * directions).sum(1, keepdim=True) * directions
        # 1e-3: what float32 leaves of a part 1e5 times as large
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-3)
    assert total_norm(group) > 0.1


# ---- complete runs by Lightning -------------------------------------------------------------


def test_the_bar_shows_figures_that_the_host_has(trained_suite):
    """Lightning reads what is logged for its bar from the device in every step: nothing is."""
    suite, trainer = trained_suite
    assert trainer.progress_bar_metrics == {}
    figures = Bar().get_metrics(trainer, suite)
    assert figures.keys() == {"fvu", "val/fvu/mean"}
    assert all(type(value) is float for value in figures.values())
    assert figures["val/fvu/mean"] == pytest.approx(
        float(trainer.callback_metrics["val/fvu/mean"])
    )


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("kind", FAMILY)
def test_no_step_waits_for_the_device(kind, nonfinite, make_data, monkeypatch):
    """The complete step of Lightning's loop, with dead latents, but for those that are logged."""
    architecture, values = FAMILY[kind]
    own = {"layer_bias": "per_layer", "layer_rank": 2} if kind in ("batchtopk", "gated") else {}
    sae = partial(architecture, **values, **own, expansion=4)
    group = tiny_group([0, 1], dead_after=1, sae=sae, nonfinite=nonfinite)
    group.means = dict.fromkeys([0, 1], torch.zeros(32))
    watched, dead = [], []
    step, read = GroupSAE.optimizer_step, Readback.read

    def read_later(self):
        with waiting():  # for a copy that began a step ago
            return read(self)

    def watch(self, *args, **kwargs):
        logs = (self.global_step + 1) % 2 == 0
        watched.append(self.global_step)
        with contextlib.nullcontext() if logs else no_waiting():
            step(self, *args, **kwargs)
        dead.append(sum(self.joint.num_dead.read()))

    monkeypatch.setattr(Readback, "read", read_later)
    monkeypatch.setattr(GroupSAE, "optimizer_step", watch)
    fit(group, make_data([[0, 1]]))
    assert watched == list(range(6))
    assert dead[-1] > 0 or kind in ("jumprelu", "relu", "gated")  # which fire everywhere at first


@pytest.fixture(scope="module")
def trained_suite(make_data):
    suite = tiny_suite()
    return suite, fit(suite, make_data(GROUPS))


def test_groups_trained_together_equal_groups_trained_alone_bit_for_bit(trained_suite, make_data):
    suite, trainer = trained_suite
    assert trainer.global_step == 6
    assert [m.layers for m in suite.members()] == GROUPS
    for member in suite.members():
        alone = tiny_group(member.layers)
        start = alone.sae.W_enc.detach().clone()
        fit(alone, make_data([member.layers]))
        for name, value in member.state_dict().items():
            assert torch.equal(alone.state_dict()[name], value) or name == "norm_factors", name
        torch.testing.assert_close(alone.norm_factors, member.norm_factors, equal_nan=True)
        assert not torch.equal(alone.sae.W_enc, start)


def test_after_every_run_decoders_are_unit_and_every_kept_token_is_counted(
    trained_suite, make_data
):
    suite, _ = trained_suite
    data = make_data(GROUPS)
    data.setup("fit")
    kept = [~torch.isin(tokens, data.special_ids).flatten() for tokens in data.train_dataloader()]
    keep = torch.cat(kept)
    for member in suite.members():
        norms = member.sae.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
        drawn = draw_layers(torch.arange(len(keep)), member.layers, seed=0)[0, keep]
        expected = torch.bincount(drawn, minlength=len(member.tokens_per_layer))
        assert torch.equal(member.tokens_per_layer, expected)


def test_rows_of_a_token_are_counted_for_their_layers_and_as_the_age_of_latents(make_data):
    data = make_data([[0, 1], [2]], layers_per_token=2)
    pair, single = tiny_group([0, 1]), tiny_group([2])
    data.setup("fit")
    tokens = next(iter(data.train_dataloader()))
    batch = data.activations(tokens, data.slots)
    counted = int((~torch.isin(tokens, data.special_ids)).sum())
    for group in (pair, single):
        x, layers = group.rows(batch)
        group.step(x, layers, group.moments(x, layers))
    assert pair.tokens_per_layer.tolist() == [counted] * 2  # every layer of every token
    assert single.tokens_per_layer.tolist() == [0, 0, counted]
    assert pair.tokens_since_fired.unique().tolist() == [2 * counted]
    assert single.tokens_since_fired.unique().tolist() == [counted]


def test_dead_latents_were_part_of_the_run_that_is_compared(trained_suite):
    # without any, AuxK would be left out of the comparison bit for bit
    suite, _ = trained_suite
    assert any(member.dead().any() for member in suite.members())


def test_validation_gives_every_layers_fvu_by_its_own_factor(trained_suite, make_data):
    suite, trainer = trained_suite
    logged = trainer.callback_metrics
    data = make_data(GROUPS)
    data.setup("fit")
    tokens = torch.cat(list(data.val_dataloader()))
    batch = data.activations(tokens, [[layer] for layer in range(4)])
    owner = {layer: m for m in suite.members() for layer in m.layers}
    for layer in range(4):
        acts, _ = batch.rows([layer])
        x = acts.double()
        x_hat, latents = owner[layer].reconstruct(acts, layer)
        fvu = (x - x_hat.double()).square().sum() / (x - x.mean(0)).square().sum()
        # 1e-4: batches of another size round the forward otherwise
        torch.testing.assert_close(
            logged[f"val/fvu/layer.{layer}"].double(), fvu, rtol=1e-4, atol=0
        )
        l0 = (latents.acts > 0).sum(1).double().mean()
        torch.testing.assert_close(logged[f"val/l0/layer.{layer}"].double(), l0, rtol=1e-3, atol=0)
    mean = torch.stack([logged[f"val/fvu/layer.{layer}"] for layer in range(4)]).mean()
    torch.testing.assert_close(logged["val/fvu/mean"], mean)


def test_a_nan_in_the_activations_ends_the_run_with_one_sentence(make_data):
    class Spoilt(GroupSAE):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                batch = batch._replace(acts=batch.acts * torch.nan)
            return super().training_step(batch, batch_idx)

    group = tiny_group([0, 1])
    group.__class__ = Spoilt
    with pytest.raises(UserError, match="layers.0: the loss is not a finite number at step 3"):
        fit(group, make_data([[0, 1]]))


@pytest.mark.parametrize("what", ["weights", "losses"])
def test_what_is_not_finite_is_not_saved(what, make_data, tmp_path):
    group = tiny_group([0, 1])
    trainer = fit(group, make_data([[0, 1]]))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    if what == "weights":
        with torch.no_grad():
            group.sae.W_enc[0, 0] = math.inf
    else:
        step(group, math.inf * torch.ones(3, 32), torch.tensor([0, 1, 0]))
    with pytest.raises(UserError, match="layers.0: the loss is not a finite number at step 6"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["good.ckpt"]


def test_a_checkpoint_of_another_partition_is_refused(trained_suite, tmp_path):
    suite, trainer = trained_suite
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    suite.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    with pytest.raises(UserError, match="holds the partition 00000000"):
        suite.on_load_checkpoint({"plan": "0" * 64})
