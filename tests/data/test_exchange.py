"""Rows that travel between processes, without any process: what one sends the others get."""

from itertools import islice

import pytest
import torch

from groupsae.data.exchange import Exchange
from tests.helpers.data_modules import CONTEXT, data_module
from tests.helpers.lms import frozen
from tests.helpers.waiting import no_waiting, waiting

SLOTS = [[0, 1], [2], [3, 1, 2], [3]]
WANTED = [
    pytest.param([[[0, 1], [3]], [[2], [3, 1, 2]]], id="two"),
    pytest.param([[[0, 1], [2], [3, 1, 2]], [], [[3]]], id="one without an SAE"),
    pytest.param([[[0, 1], [3]], [[2], [0, 1]], [[3, 1, 2]]], id="a slot that two need"),
]


class Post:
    """All processes' all-to-alls, each of which needs what the others send: done by turns.

    In the first turn every process sends, and gets zeros; in the second it gets what was sent.
    """

    def __init__(self, processes: int) -> None:
        self.sent: list[list[list[torch.Tensor]]] = [[] for _ in range(processes)]
        self.turn, self.calls = 0, [0] * processes

    def swap(self, rank: int):
        def swap(rows, sent, received):
            assert rows.is_contiguous()
            with waiting():
                number = self.calls[rank]
                self.calls[rank] += 1
                if self.turn == 0:
                    self.sent[rank].append([part.clone() for part in rows.split(sent)])
                    return rows.new_zeros(sum(received), *rows.shape[1:])
                came = [sender[number][rank] for sender in self.sent]
                assert [len(part) for part in came] == received
                return torch.cat(came)

        return swap

    def deliver(self) -> None:
        self.turn, self.calls = 1, [0] * len(self.calls)


@pytest.fixture(scope="module")
def make_data(tiny_lm, tiny_text, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(rank=0, processes=1, store=None, lm=None, **changes):
        values = {
            "prepend_bos": True, "exclude_special_tokens": True, "skip_positions": 2,
            "blocks_per_step": 12, "blocks_per_forward": 2, "tokens": 3 * 12 * CONTEXT,
            "rank": rank, "world_size": processes,
            "store": None if store is None else (str(store), "float32"),
        }  # fmt: skip
        lm = frozen(tiny_lm) if lm is None else lm
        data = data_module(lm, tiny_text, cache, slots=SLOTS, **(values | changes))
        data.reader.fill_training()
        return data

    return make


def exchanged(make_data, wanted, take, **changes):
    """Return what `take` finds in every process's data module, once rows really travel."""
    processes = len(wanted)
    posts = Post(processes), Post(processes)
    ranks = [make_data(rank, processes, **changes) for rank in range(processes)]
    layers = [[[x] for x in sorted({x for slot in each for x in slot})] for each in wanted]
    for rank, data in enumerate(ranks):
        data.exchange(
            Exchange(list(map(data.each_row, wanted)), rank, posts[0].swap(rank)),
            Exchange(layers, rank, posts[1].swap(rank)),
        )
    for data in ranks:
        take(data)
    for post in posts:
        post.deliver()
    for data in ranks:
        data.blocks_seen = 0
    return [take(data) for data in ranks]


def trained(data):
    """Return the batches of a training, as Lightning hands them over."""
    batches = []
    data.trainer.training = True
    for tokens in data.train_dataloader():
        drawn = data.on_before_batch_transfer(tokens, 0).to(data.device)
        with no_waiting():
            batches.append(data.on_after_batch_transfer(drawn, 0))
    return batches


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(
    "changes",
    [{}, {"exclude_special_tokens": False, "skip_positions": 0}, {"max_norm_ratio": 1.2},
     {"blocks_per_forward": 5}, {"layers_per_token": 2}],
)  # fmt: skip
def test_an_owner_gets_the_rows_that_one_process_would_have(make_data, wanted, changes):
    whole = trained(make_data(**changes))
    owners = exchanged(make_data, wanted, trained, **changes)
    assert len(whole) == 3
    for own, batches in zip(wanted, owners, strict=True):
        for alone, spread in zip(whole, batches, strict=True):
            rows_of = [min(len(slot), changes.get("layers_per_token", 1)) for slot in own]
            assert len(spread.acts) == sum(rows_of)
            for slot in own:
                rows, layers = spread.rows(slot)
                expected, drawn = alone.rows(slot)
                assert torch.equal(layers, drawn)
                if "blocks_per_forward" in changes:  # other shapes, another order of sums
                    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
                else:
                    assert torch.equal(rows, expected)


@pytest.mark.parametrize("ratio", [None, 1.2])
def test_validation_brings_the_layers_of_an_owners_saes(make_data, ratio):
    def validated(data):
        found = []
        for tokens in islice(data.val_dataloader(), 2):
            drawn = [each.to(data.device) for each in data.on_before_batch_transfer(tokens, 0)]
            parts = list(data.on_after_batch_transfer(drawn, 0))
            found.append([[part.rows(slot)[0] for slot in part.slots] for part in parts])
        return found

    wanted = [[[0, 1], [3]], [[2]]]
    changes = {"training": False, "max_norm_ratio": ratio}
    (whole,) = [validated(make_data(**changes))]
    first, second = exchanged(make_data, wanted, validated, **changes)
    for places, spread in ([0, 1, 3], first), ([2], second):
        for alone, parts in zip(whole, spread, strict=True):
            for place, layer in enumerate(places):
                one = torch.cat([part[layer] for part in alone])
                came = torch.cat([part[place] for part in parts])
                assert len(one) == len(came)
                # one part has rows of all processes: the same rows in another order
                assert torch.equal(one.sum(1).sort().values, came.sum(1).sort().values)


@pytest.mark.parametrize("ratio", [None, 1.2])
def test_rows_from_a_store_travel_as_those_of_the_model(make_data, tmp_path, ratio):
    """One process fills it, so forwards are cut for one; then three read their shares."""
    wanted, changes = [[[0, 1], [3]], [], [[2], [0, 1]]], {"max_norm_ratio": ratio}

    def validated(data):
        data.trainer.training = False
        parts = [data.on_before_batch_transfer(batch, 0) for batch in data.val_dataloader()]
        return [batch for part in parts for batch in data.on_after_batch_transfer(part, 0)]

    def both(data):
        return trained(data), validated(data)

    make_data(heldout_tokens=2 * 12 * CONTEXT, store=tmp_path, **changes)
    more = {"heldout_tokens": 2 * 12 * CONTEXT, **changes}
    streamed = exchanged(make_data, wanted, both, **more)
    stored = exchanged(make_data, wanted, both, store=tmp_path, **more)
    for (batches, parts), (from_store, parts_from_store) in zip(streamed, stored, strict=True):
        found = zip([*batches, *parts], [*from_store, *parts_from_store], strict=True)
        for mine, other in found:
            assert mine.acts.shape == other.acts.shape
            torch.testing.assert_close(mine.acts, other.acts, rtol=0, atol=1e-5)
            assert torch.equal(mine.layers, other.layers)
            assert (mine.keep is None) == (other.keep is None)
            assert mine.keep is None or torch.equal(mine.keep, other.keep)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_travel_in_the_models_own_precision(make_data, tiny_lm, dtype):
    data = make_data(lm=frozen(tiny_lm, dtype=dtype))
    sent = []

    def swap(rows, to, received):
        sent.append(rows)
        return rows

    data.exchange(Exchange([SLOTS], 0, swap), Exchange([[]], 0, swap))
    batches, alone = trained(data), trained(make_data(lm=frozen(tiny_lm, dtype=dtype)))
    assert {rows.dtype for rows in sent} == {getattr(torch, dtype)}
    assert batches[0].acts.dtype == torch.float32
    assert torch.equal(batches[0].acts, alone[0].acts)


def test_bytes_are_those_that_go_to_others():
    wanted = [[[0], [1]], [[2]], []]
    exchange = Exchange(wanted, 0, lambda rows, sent, received: rows)
    sent, received = exchange.bytes_per_token(10)
    assert sent == [10, 20, 30]
    assert received == [40, 20, 0]
    assert sum(sent) == sum(received)
