"""A training step's activations are queued without waiting for the device."""

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from groupsae.data.draws import draw, draw_layers
from groupsae.data.exchange import Exchange
from groupsae.lm.hooked import nothing_padded
from tests.helpers import families
from tests.helpers.data_modules import CONTEXT, data_module
from tests.helpers.lms import frozen
from tests.helpers.waiting import no_waiting

SLOTS = [[0, 1], [2], [3, 1, 2], [3]]


@pytest.fixture(scope="module")
def make_data(tiny_lm, tiny_text, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(lm=None, slots=SLOTS, **changes):
        values = {
            "prepend_bos": True, "exclude_special_tokens": True, "skip_positions": 2,
            "blocks_per_step": 6, "tokens": 3 * 6 * CONTEXT,
        }  # fmt: skip
        lm = frozen(tiny_lm) if lm is None else lm
        return data_module(lm, tiny_text, cache, slots=slots, **(values | changes))

    return make


def queue(data, tokens):
    """Do on the device what a training step does with a batch, as Lightning hands it over."""
    drawn = data.on_before_batch_transfer(tokens, 0).to(data.device)
    with no_waiting():
        batch = data.on_after_batch_transfer(drawn, 0)
        return batch, [batch.rows(slot) for slot in batch.slots]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x[0]),
        lambda x: (x > 0).nonzero(), lambda x: x.long().bincount(), lambda x: float(x.sum()),
        lambda x: x.__setitem__(x > 0, torch.ones(3)), lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(), lambda x: x.masked_select(x > 0), lambda x: x.cpu(),
        lambda x: x.repeat_interleave(x.long()),
    ],
)  # fmt: skip
def test_what_waits_for_a_device_is_noticed(use):
    with pytest.raises(AssertionError, match="the host waits in"), no_waiting():
        use(torch.arange(4.0))


@pytest.mark.parametrize(
    "changes", [{}, {"exclude_special_tokens": False, "skip_positions": 0}, {"skip_positions": 0}]
)
def test_nothing_waits_while_a_training_steps_activations_are_queued(make_data, changes):
    data = make_data(**changes)
    for tokens in data.train_dataloader():
        batch, rows = queue(data, tokens)
        for slot, (acts, layers) in enumerate(rows):
            keep = slice(None) if batch.keep is None else batch.keep[slot]
            assert torch.equal(acts, batch.acts[slot][keep])
            assert torch.equal(layers, batch.layers[slot][keep])
    assert data.blocks_seen == 18


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "opt", "bert", "t5"])
def test_nothing_waits_in_the_forwards_of_other_families(make_data, tiny_lm, tmp_path, family):
    folder = families.save(family, tmp_path, tiny_lm)
    lm = frozen(folder, stack="decoder" if family in families.PAIRS else None)
    data = make_data(lm=lm, prepend_bos=False, slots=[[0, 1]])
    queue(data, next(iter(data.train_dataloader())))


def test_a_norm_filter_waits_for_the_number_of_rows(make_data):
    data = make_data(max_norm_ratio=1.2)
    drawn = data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
    with no_waiting():
        batch = data.on_after_batch_transfer(drawn, 0)
        with pytest.raises(AssertionError, match="with a mask"):
            batch.rows([0, 1])


@pytest.mark.parametrize("blocks_per_forward", [1, 2, 5, 9])
@pytest.mark.parametrize("first_position", [0, 10_007])
def test_places_of_each_layer_are_those_that_a_search_finds(blocks_per_forward, first_position):
    tokens = torch.arange(5 * CONTEXT).view(5, CONTEXT)
    drawn = draw(
        tokens, Exchange([SLOTS]), lambda _: None, seed=3, first_position=first_position,
        blocks_per_forward=blocks_per_forward,
    )  # fmt: skip
    assert len(drawn.order) == len(drawn.shares) == 2  # of the slots of several layers
    assert drawn.made.kept is None
    for row, slot in enumerate([0, 2]):
        (layers,) = draw_layers(torch.arange(tokens.numel()) + first_position, SLOTS[slot], 3)
        assert torch.equal(drawn.made.layers[slot], layers)
        size = blocks_per_forward * CONTEXT
        parts = zip(drawn.order[row].split(size), layers.split(size), strict=True)
        for (order, drawn_layers), share in zip(parts, drawn.shares[row], strict=True):
            expected = [(drawn_layers == x).nonzero().squeeze(1) for x in sorted(SLOTS[slot])]
            assert torch.equal(order, torch.cat(expected))
            assert list(share.values()) == [len(found) for found in expected]


@pytest.mark.parametrize("blocks_per_forward", [1, 2, 4, 5, 6, 7, 100])
@pytest.mark.parametrize(("blocks_per_step", "world_size"), [(3, 1), (6, 1), (6, 2)])
def test_steps_and_forwards_may_have_any_two_sizes(
    make_data, blocks_per_forward, blocks_per_step, world_size
):
    sizes = {"blocks_per_step": blocks_per_step, "tokens": 18 * CONTEXT}
    alone = make_data(blocks_per_forward=blocks_per_step, **sizes)
    ranks = [
        make_data(rank=r, world_size=world_size, blocks_per_forward=blocks_per_forward, **sizes)
        for r in range(world_size)
    ]
    loaders = [data.train_dataloader() for data in (alone, *ranks)]
    for whole, *parts in zip(*loaders, strict=True):
        expected, _ = queue(alone, whole)
        found = [queue(data, part)[0] for data, part in zip(ranks, parts, strict=True)]
        acts = torch.cat([batch.acts for batch in found], dim=1)
        # products of another height may round otherwise
        torch.testing.assert_close(acts, expected.acts, rtol=1e-4, atol=1e-4)
        for name in ("layers", "keep"):
            joined = torch.cat([getattr(batch, name) for batch in found], dim=1)
            assert torch.equal(joined, getattr(expected, name))
    assert {data.blocks_seen for data in (alone, *ranks)} == {18}


def test_masks_are_believed_to_be_ones_inside_only():
    mask = torch.ones(2, CONTEXT, dtype=torch.bool)
    mask[0, :3] = False
    given = {"batch_size": 2, "q_length": CONTEXT, "kv_length": CONTEXT, "attention_mask": mask}
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    assert before["sdpa"](**given) is not None
    with nothing_padded(), nothing_padded():
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**given) is None
    with pytest.raises(KeyError), nothing_padded():
        raise KeyError
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before
    try:  # neither hidden by what is left behind, nor lost
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = min
        with nothing_padded():
            pass
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is min
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_and_gives_what_the_cpu_gives(make_data):
    cpu, gpu = make_data(), make_data(device="cuda")
    for number, tokens in enumerate(gpu.train_dataloader()):
        assert tokens.is_pinned()
        drawn = gpu.on_before_batch_transfer(tokens, 0)
        assert all(
            t.is_pinned() for t in (drawn.tokens, drawn.order, *drawn.made) if t is not None
        )
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first warms up
        try:
            batch = gpu.on_after_batch_transfer(drawn.to(gpu.device), 0)
            rows = [batch.rows(slot) for slot in SLOTS]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        _, expected = queue(cpu, tokens)
        for mine, its in zip(rows, expected, strict=True):
            torch.testing.assert_close(mine[0].cpu(), its[0], rtol=1e-3, atol=1e-3)
            assert torch.equal(mine[1].cpu(), its[1])
