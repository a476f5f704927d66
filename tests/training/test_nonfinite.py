"""A step whose loss or gradient is not finite: the run stops, or that SAE leaves the step out."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from groupsae.runtime.errors import UserError
from groupsae.training import nonfinite
from groupsae.training.optim import Adam
from tests.helpers import saes
from tests.helpers.fits import GROUPS, fit, tiny_group, tiny_suite

BAD = 2  # number of the poisoned step, the first being 0


def poisoned(data, layer, value=torch.nan, steps=(BAD,)):
    """Let the activations of a layer be spoilt in some steps' text, as often as it is read."""
    data.setup("fit")
    tokens = list(data.train_dataloader())
    bad = torch.stack([tokens[step][0] for step in steps])
    rows = data.live.rows

    def spoil(drawn):
        made = rows(drawn)
        if any(torch.equal(drawn.tokens[0], block) for block in bad):
            for acts, layers in zip(made.acts, made.layers, strict=True):
                acts[layers == layer] = value
        return made

    data.live.rows = spoil
    return data


def state_of(module, trainer):
    """Return weights, counters and Adam's state of each member."""
    groups = trainer.optimizers[0].state_dict()
    for member, group in zip(module.joint.groups, groups["param_groups"], strict=True):
        own = {k: v.clone() for k, v in member.state_dict().items() if k != "norm_factors"}
        moments = {
            f"{place}/{name}": value
            for place, number in enumerate(group["params"])
            for name, value in groups["state"][number].items()
        }
        yield own | moments


def equal(one, other, but=()):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert name in but or torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def undisturbed(make_data):
    suite = tiny_suite()
    return list(state_of(suite, fit(suite, make_data(GROUPS))))


def test_without_a_bad_step_skipping_changes_no_bit(undisturbed, make_data):
    suite = tiny_suite("skip")
    for mine, theirs in zip(
        state_of(suite, fit(suite, make_data(GROUPS))), undisturbed, strict=True
    ):
        equal(mine, theirs)


@pytest.fixture(scope="module")
def without_that_step(make_data):
    """Return the state of a group of layer 2 that never saw the text of the bad step."""
    data = make_data([[2]])
    data.setup("fit")
    others = [tokens for number, tokens in enumerate(data.train_dataloader()) if number != BAD]
    data.train_dataloader = lambda: DataLoader(others, batch_size=None)
    data.num_steps = len(others)
    group = tiny_group([2])
    return next(state_of(group, fit(group, data)))


@pytest.mark.filterwarnings("ignore:.*left out.*")
@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_bad_step_changes_nothing_of_its_sae_and_of_no_other(
    how, undisturbed, without_that_step, make_data, monkeypatch
):
    data, suite = make_data(GROUPS), tiny_suite("skip")
    suite.configure_model()
    if how == "gradient":
        sae = suite.members()[1].sae
        project = sae.project_gradient

        def spoil():
            project()
            if suite.global_step == BAD:
                sae.W_enc.grad[3, 1] = torch.inf

        monkeypatch.setattr(sae, "project_gradient", spoil)
    else:
        data = poisoned(data, 2, torch.nan if how == "nan" else torch.inf)
    first, second, third = state_of(suite, fit(suite, data))
    equal(first, undisturbed[0])
    equal(third, undisturbed[2])
    equal(second, without_that_step, but=["skipped"])
    assert second["skipped"].tolist() == [1, 0, BAD + 1]
    assert second["5/step" if "5/step" in second else "0/step"] == 5


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "relu", "gated", "matryoshka"])
def test_normalising_a_member_that_leaves_the_step_out_changes_no_bit(name):
    kind, values = saes.FAMILY[name]
    group = tiny_group([2], sae=partial(kind, **values, expansion=4))
    sae = group.sae
    with torch.no_grad():
        for each in sae.parameters():
            each.mul_(1.1).add_(0.01)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    for bad in (True, False):
        group.normalize_decoder(torch.tensor(bad))
        changed = {k for k, v in sae.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == (set() if bad else set(sae.normalized))


def test_a_skipped_step_warns_once_and_is_counted_and_logged(make_data):
    suite = tiny_suite("skip")
    with pytest.warns(
        UserWarning, match=r"layers.0-1: 2 steps were left out .* step 4, .*"
    ) as warned:
        trainer = fit(suite, poisoned(make_data(GROUPS), 1, steps=(2, 3, 4)))
    (sentence,) = [str(w.message) for w in warned if "left out" in str(w.message)]
    assert "the activations of layer 1 are not finite in that step" in sentence
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if "skipped" in k}
    assert logged == {f"train/skipped/{m.name}": 3 * (m.layers == [0, 1]) for m in suite.members()}
    assert all(value.isfinite() for value in trainer.callback_metrics.values())


def test_stopping_names_member_step_and_layer(make_data):
    # the third step; what is logged says it in the fourth
    with pytest.raises(UserError) as stopped:
        fit(tiny_suite(), poisoned(make_data(GROUPS), 1))
    message = str(stopped.value)
    assert message.startswith("layers.0-1: the loss is not a finite number at step 3 of 6: ")
    assert "the activations of layer 1 are not finite in that step" in message
    assert "nonfinite=skip" in message


def test_too_many_steps_in_a_row_end_the_run(make_data, monkeypatch):
    monkeypatch.setattr(nonfinite, "MOST_IN_A_ROW", 3)
    data = poisoned(make_data(GROUPS), 3, steps=(1, 2, 3))
    with (
        pytest.warns(UserWarning, match="a step was left out"),
        pytest.raises(UserError, match="layers.3: 3 steps in a row or more .* up to step 4 of 6"),
    ):
        fit(tiny_suite("skip"), data)


def test_an_adam_that_leaves_a_group_out_steps_the_others_as_adam_does():
    def made(plain):
        optim = Adam(
            base_lr=1e-2, base_d_sae=4, betas=(0.9, 0.999), eps=1e-8, clip_norm=1.0, warmup=0,
            decay="constant", decay_share=0,
        )  # fmt: skip
        weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, (1.0, 0.1), strict=True)]
        built = optim.build(groups)
        return weights, torch.optim.Adam(built.param_groups, fused=True) if plain else built

    (a, plain), (b, skipping) = made(True), made(False)
    for number in range(3):
        for one, other in zip(a, b, strict=True):
            one.grad, other.grad = torch.arange(3.0) - number, torch.arange(3.0) - number
        if number == 1:
            a[0].grad, b[0].grad = None, torch.full((3,), torch.nan)
            skipping.before = lambda: [torch.ones(()), torch.zeros(())]
        else:
            skipping.before = lambda: None
        plain.step()
        skipping.step()
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)
        for name, value in plain.state[one].items():
            assert torch.equal(value, skipping.state[other][name]), name
    assert [g["lr"] for g in skipping.param_groups] == [1.0, 0.1]
    assert plain.state_dict()["param_groups"] == skipping.state_dict()["param_groups"]


def test_another_word_is_refused():
    with pytest.raises(UserError, match="nonfinite is 'ignore': use stop, skip"):
        tiny_suite("ignore")
