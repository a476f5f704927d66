"""Which positions count, against a loop over tokens; and that every filter is on record."""

import pytest
import torch

from groupsae.data.filters import TokenFilter, both, check_skip_positions
from groupsae.runtime.errors import UserError
from groupsae.training.measure import provenance_of
from tests.helpers.data_modules import CONTEXT, data_module
from tests.helpers.lms import frozen

SLOTS = [[0, 1], [2], [1, 2, 3], [3]]


@pytest.fixture(scope="module")
def make_data(tiny_lm, tiny_text, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(lm=None, **changes):
        values = {"tokens": 4 * CONTEXT} | changes
        return data_module(frozen(tiny_lm, **(lm or {})), tiny_text, cache, slots=SLOTS, **values)

    return make


def draw_tokens(blocks=5):
    tokens = torch.randint(1, 512, (blocks, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, ::5] = 0
    return tokens


def test_tokens_that_count_are_those_of_a_loop():
    tokens, special = draw_tokens(), torch.tensor([0, 7])
    for ids, skip in ((None, 3), (special, 0), (special, 3)):
        keep = TokenFilter(ids, skip, None).tokens(tokens)
        for block, row in enumerate(tokens.tolist()):
            for position, token in enumerate(row):
                left_out = position < skip or (ids is not None and token in (0, 7))
                assert bool(keep[block, position]) is not left_out
    assert TokenFilter(None, 0, 2.0).tokens(tokens) is None


def test_activations_that_count_are_within_a_multiple_of_their_blocks_median():
    acts = torch.randn(6, 11, 8) * torch.rand(6, 11, 1) * 4
    acts[2, 3] = 0
    keep = TokenFilter(None, 0, 1.5).activations(acts)
    for block, rows in zip(keep, acts, strict=True):
        norms = sorted(float(row.norm()) for row in rows)
        for kept, row in zip(block, rows, strict=True):
            assert bool(kept) is (float(row.norm()) <= 1.5 * norms[5])
    assert 0 < keep.float().mean() < 1
    assert TokenFilter(None, 4, None).activations(acts) is None


def test_the_median_knows_its_own_block_only_and_what_is_not_finite_is_seen():
    acts = torch.randn(4, 9, 8)
    filters = TokenFilter(None, 0, 1.2)
    alone = torch.cat([filters.activations(block[None]) for block in acts])
    assert torch.equal(alone, filters.activations(acts))
    acts[1, 2], acts[3, 4] = torch.nan, torch.inf
    assert filters.activations(acts)[1, 2]
    assert filters.activations(acts)[3, 4]


def test_both_masks_hold_and_none_keeps_all():
    first, second = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert both(None, None) is None
    assert both(first, None) is both(None, first) is first
    assert both(first, second).tolist() == [True, False, False]


@pytest.mark.parametrize("part", [1, 2, 5])
def test_each_row_is_judged_by_the_norms_of_the_layer_that_it_comes_from(make_data, part):
    data = make_data(
        max_norm_ratio=1.1, skip_positions=2, exclude_special_tokens=True, blocks_per_forward=part
    )
    tokens = draw_tokens()
    batch = data.activations(tokens, SLOTS, 7)
    every = data.activations(tokens, [[layer] for layer in range(4)]).acts
    typical = []
    for acts in every:
        norms = acts.norm(dim=1).view(tokens.shape)
        typical.append((norms <= 1.1 * norms.median(1, keepdim=True).values).flatten())
    counted = (tokens != 0) & (torch.arange(CONTEXT) >= 2)
    for slot in range(len(SLOTS)):
        for row, layer in enumerate(batch.layers[slot].tolist()):
            expected = bool(counted.flatten()[row]) and bool(typical[layer][row])
            assert bool(batch.keep[slot, row]) is expected
        acts, layers = batch.rows(SLOTS[slot])
        assert torch.equal(acts, batch.acts[slot][batch.keep[slot]])
        assert len(layers) == len(acts) < tokens.numel()
    assert not torch.equal(batch.keep[1], batch.keep[3])


def test_calibration_leaves_a_token_out_that_is_extreme_in_any_layer(make_data):
    data = make_data(max_norm_ratio=1.1)
    (batch,) = data.calibration_batches(4 * CONTEXT)
    everywhere = batch.everywhere()
    for token in range(len(everywhere)):
        assert bool(everywhere[token]) is all(bool(batch.keep[layer, token]) for layer in range(4))
    assert everywhere.sum() < batch.keep.sum(1).min()


CHANGES = [
    {}, {"exclude_special_tokens": True}, {"skip_positions": 1}, {"max_norm_ratio": 3.0},
    {"lm": {"hookpoint": "resid_pre"}}, {"lm": {"hookpoint": "mlp_out"}},
    {"lm": {"hookpoint": "mlp_out", "submodule": "mlp.dense_h_to_4h"}},
    {"lm": {"dtype": "bfloat16"}}, {"lm": {"load": {"attn_implementation": "eager"}}},
]  # fmt: skip


def test_everything_that_decides_activations_is_in_the_provenance_of_a_measurement(make_data):
    found = [provenance_of(make_data(**changes), 64, "none") for changes in CHANGES]
    for i, first in enumerate(found):
        assert all(first != second for second in found[:i])
    assert found[0]["hookpoint"] == "resid_post"
    # where the weights come from is no matter
    offline = make_data(lm={"load": {"local_files_only": True}})
    assert provenance_of(offline, 64, "none") == found[0]


@pytest.mark.parametrize(
    ("skip", "sentence"),
    [
        (16, "stream.skip_positions is 16; it must be an integer from 0 to 15"),
        (True, "skip_positions is True"), (1.5, "skip_positions is 1.5"),
    ],
)  # fmt: skip
def test_positions_that_cannot_be_skipped_are_refused(skip, sentence):
    with pytest.raises(UserError, match=sentence):
        check_skip_positions(skip, 16)
