"""Tokens in, residual rows out: against every layer's residuals, token by token."""

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from groupsae.data.draws import draw_layers
from groupsae.runtime.errors import UserError
from tests.helpers.data_modules import CONTEXT, data_module
from tests.helpers.lms import frozen

D_MODEL, LAYERS = 32, 4
SLOTS = [[0, 1], [2], [1, 2, 3], [3]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_data(tiny_lm, tiny_text, cache):
    """Return a function that gives a data module on a given rank of an imagined trainer."""
    return partial(data_module, frozen(tiny_lm), tiny_text, cache, slots=SLOTS)


def token_batch(blocks=5, seed=0):
    return torch.randint(0, 512, (blocks, CONTEXT), generator=torch.Generator().manual_seed(seed))


def all_residuals(data, tokens):
    """Every layer's residual by Hugging Face; the last one caught before the final norm."""
    before_norm = []
    handle = data.hooked.model.final_layer_norm.register_forward_pre_hook(
        lambda _, args: before_norm.append(args[0])
    )
    with torch.no_grad():
        hidden = data.hooked.model(input_ids=tokens, output_hidden_states=True).hidden_states
    handle.remove()
    return [r.flatten(0, 1) for r in [*hidden[1:LAYERS], before_norm[0]]]


def handed_over(data, tokens):
    """Return what Lightning hands to a step for a batch of the loader."""
    drawn = data.on_before_batch_transfer(tokens, 0)
    return data.on_after_batch_transfer(move_data_to_device(drawn, data.device), 0)


def training_batches(data):
    return [handed_over(data, tokens) for tokens in data.train_dataloader()]


@pytest.mark.parametrize("first_position", [0, 12_345])
def test_each_row_is_the_drawn_layers_residual_of_its_token(make_data, first_position):
    data, tokens = make_data(blocks_per_forward=5), token_batch()
    residuals = all_residuals(data, tokens)
    batch = data.activations(tokens, SLOTS, first_position)
    assert batch.acts.shape == (len(SLOTS), 5 * CONTEXT, D_MODEL)
    assert batch.acts.dtype == torch.float32
    assert not batch.acts.requires_grad
    assert not batch.acts.is_inference()
    for slot, layers in enumerate(SLOTS):
        drawn = set()
        for token in range(tokens.numel()):
            layer = int(draw_layers(torch.tensor([first_position + token]), layers, data.seed))
            assert int(batch.layers[slot, token]) == layer
            assert torch.equal(batch.acts[slot, token], residuals[layer][token])
            drawn.add(layer)
        assert drawn == set(layers)


@pytest.mark.parametrize("rows", [2, 9])
def test_a_token_gives_a_group_rows_of_different_layers(make_data, rows):
    data, tokens = make_data(blocks_per_forward=5, layers_per_token=rows), token_batch()
    residuals, places = all_residuals(data, tokens), torch.arange(tokens.numel())
    batch = data.activations(tokens, SLOTS, first_position=7)
    for slot in SLOTS:
        count = min(rows, len(slot))
        acts, layers = batch.rows(slot)
        assert acts.shape == (count * len(places), D_MODEL)
        expected = torch.stack(residuals)[layers, places.repeat(count)]
        assert torch.equal(acts, expected)
        drawn = draw_layers(places + 7, slot, data.seed, count)
        assert torch.equal(layers, drawn.flatten())
        if count == len(slot):
            found = layers.bincount().tolist()
            assert found == [len(places) * (x in slot) for x in range(max(slot) + 1)]


@pytest.mark.parametrize("part", [1, 2, 3, 9])
def test_a_forward_in_parts_gives_the_rows_of_a_forward_in_one(make_data, part):
    tokens = token_batch()
    whole = make_data(blocks_per_forward=5).activations(tokens, SLOTS, 7)
    parts = make_data(blocks_per_forward=part).activations(tokens, SLOTS, 7)
    # matrix products of another height may round otherwise
    torch.testing.assert_close(parts.acts, whole.acts, rtol=1e-4, atol=1e-4)
    assert torch.equal(parts.layers, whole.layers)
    assert parts.keep is None
    assert whole.keep is None


def test_special_tokens_are_kept_unless_excluded(make_data):
    tokens = token_batch()
    tokens[:, ::5] = 0  # end of text, the only special token
    everything = make_data().activations(tokens, SLOTS)
    without = make_data(exclude_special_tokens=True).activations(tokens, SLOTS)
    assert everything.keep is None
    assert torch.equal(without.keep, (tokens.flatten() != 0).expand(len(SLOTS), -1))
    assert torch.equal(without.acts, everything.acts)


def test_a_prepended_bos_is_left_out_if_special_tokens_are(make_data):
    data = make_data(prepend_bos=True, exclude_special_tokens=True)
    tokens = next(iter(data.train_dataloader()))
    assert (tokens[:, 0] == 0).all()
    keep = handed_over(data, tokens).everywhere().reshape(tokens.shape)
    assert not keep[:, 0].any()
    assert keep[:, 1:].float().mean() > 0.9


def test_slots_of_early_layers_stop_the_model_early(make_data):
    data, calls = make_data(), []
    for number, block in enumerate(data.hooked.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    data.activations(token_batch(4), [[0], [0, 1]])
    assert calls == [0, 1]


def test_the_model_is_frozen_and_belongs_to_no_checkpoint(make_data):
    data = make_data()
    assert not any(p.requires_grad for p in data.hooked.model.parameters())
    assert data.state_dict().keys() == {"blocks_seen", "tokens_key", "seconds"}


def test_validation_shows_every_used_layer_and_moves_nothing(make_data):
    data, tokens = make_data(), token_batch(4)
    data.trainer.training = False
    data.set_slots([[0, 2], [3]])
    parts = list(handed_over(data, tokens))
    residuals = all_residuals(data, tokens)
    assert data.blocks_seen == 0
    assert data.used_layers() == [0, 2, 3]
    assert all(part.layers[:, 0].tolist() == [0, 2, 3] for part in parts)
    for row, layer in enumerate([0, 2, 3]):
        acts = torch.cat([part.acts[row] for part in parts])
        torch.testing.assert_close(acts, residuals[layer], rtol=1e-4, atol=1e-4)


def test_a_resumed_run_sees_the_batches_of_the_undisturbed_one(make_data):
    whole = training_batches(make_data())
    assert len(whole) == 6
    killed = make_data()
    loader = iter(killed.train_dataloader())
    for _ in range(2):
        handed_over(killed, next(loader))
    next(loader)  # a loader may be ahead of the training; what counts is what was trained on
    resumed = make_data()
    resumed.load_state_dict(killed.state_dict())
    rest = training_batches(resumed)
    assert len(rest) == 4
    for mine, expected in zip(rest, whole[2:], strict=True):
        assert torch.equal(mine.acts, expected.acts)
        assert torch.equal(mine.layers, expected.layers)
    before, after = killed.state_dict(), resumed.state_dict()
    assert after.pop("seconds") > before.pop("seconds") > 0
    assert after == {**before, "blocks_seen": 24}


def test_two_ranks_together_see_what_one_process_sees(make_data):
    one = training_batches(make_data())
    ranks = [
        training_batches(make_data(rank=rank, world_size=2, blocks_per_forward=2))
        for rank in range(2)
    ]
    assert len(one) == len(ranks[0]) == len(ranks[1])
    for whole, *halves in zip(one, *ranks, strict=True):
        layers = torch.cat([half.layers for half in halves], dim=1)
        acts = torch.cat([half.acts for half in halves], dim=1)
        assert torch.equal(layers, whole.layers)
        # two forwards of half the blocks: products of another height may round otherwise
        torch.testing.assert_close(acts, whole.acts, rtol=1e-4, atol=1e-4)


def test_a_position_in_other_text_is_refused(make_data):
    saved = make_data().state_dict()
    other = make_data(prepend_bos=True)
    with pytest.raises(UserError, match=f"{saved['tokens_key']}.*source, tokenizer or packing"):
        other.load_state_dict(saved)
    assert other.blocks_seen == 0


def test_a_context_beyond_the_models_is_refused(make_data):
    with pytest.raises(UserError, match="stream.context is 65, but .* reads at most 64"):
        make_data(context=65)


def test_a_split_smaller_than_a_step_is_refused_on_setup(make_data):
    with pytest.raises(UserError, match="split has .* less than one step of 1000000"):
        make_data(blocks_per_step=10**6, tokens=10**6 * CONTEXT)


def test_calibration_gives_all_layers_of_the_calibration_split_in_order(make_data):
    data = make_data()
    batches = list(data.calibration_batches(3 * 4 * CONTEXT))
    assert len(batches) == 3
    stored = torch.from_numpy(data.blocks.blocks["calibration"][:12].astype("int64"))
    for batch, tokens in zip(batches, stored.split(4), strict=True):
        assert batch.layers[:, 0].tolist() == list(range(LAYERS))
        for mine, expected in zip(batch.acts, all_residuals(data, tokens), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("bos", [False, True])
def test_held_out_batches_are_one_sample_of_the_complete_split_with_its_documents(make_data, bos):
    first, other = (make_data(prepend_bos=bos, seed=seed) for seed in (0, 1))
    steps = max(1, first.steps_for("heldout", None) // 2)
    read = torch.cat(list(first.loader("heldout", steps)))
    assert torch.equal(
        read, torch.cat(list(other.loader("heldout", steps)))
    )  # whatever the run's seed
    text = torch.from_numpy(first.blocks.blocks["heldout"].astype("int64"))
    found = first.heldout_documents(steps)
    assert len(found) == len(read)
    ends = (text[:, int(bos) :] == first.lm.tokenizer().eos_token_id).sum(1)
    numbers = ends.cumsum(0) - ends
    for tokens, document in zip(read, found, strict=True):
        assert document in numbers[(text == tokens).all(1)]  # a block's text may come twice
    assert not torch.equal(read, text[: len(read)])  # not simply the first ones
    assert len(set(found.tolist())) > len(set(numbers[: len(read)].tolist()))
