"""The order of the blocks depends on the place in the run and on nothing else."""

import multiprocessing
import signal
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupsae.data.loader import BlockLoader, StepSampler, block_order


def sampler(**changes):
    values = {
        "num_blocks": 11,
        "blocks_per_step": 4,
        "num_steps": 9,
        "seed": 0,
        "first_step": 0,
        "rank": 0,
        "world_size": 1,
    }
    return StepSampler(**(values | changes))


sizes = st.integers(1, 40)


@given(sizes, st.integers(0, 5), st.integers(0, 4))
def test_every_epoch_holds_every_block_once(num_blocks, seed, epoch):
    order = block_order(num_blocks, seed, start=epoch * num_blocks, count=num_blocks)
    assert sorted(order) == list(range(num_blocks))


@given(sizes, st.integers(0, 5), st.integers(0, 100), st.integers(0, 100))
def test_the_order_can_be_entered_at_any_place(num_blocks, seed, start, count):
    whole = block_order(num_blocks, seed, start=0, count=start + count)
    assert block_order(num_blocks, seed, start, count).tolist() == whole[start:].tolist()


def test_epochs_and_seeds_are_shuffled_differently():
    orders = {tuple(block_order(20, seed, start, 20)) for seed in (0, 1) for start in (0, 20)}
    assert len(orders) == 4


@given(sizes, st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.sampled_from([None, 0, 7]))
def test_ranks_share_every_step_out_in_order(num_blocks, share, world_size, seed):
    step = share * world_size
    arguments = {"num_blocks": num_blocks, "blocks_per_step": step, "seed": seed}
    alone = list(sampler(**arguments))
    ranks = [list(sampler(**arguments, rank=r, world_size=world_size)) for r in range(world_size)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("first_step", [1, 255, 256, 257, 599])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_resumed_sampler_continues_where_the_first_one_would(first_step, seed):
    whole = list(sampler(num_steps=600, seed=seed))
    assert list(sampler(num_steps=600, seed=seed, first_step=first_step)) == whole[first_step:]


def test_the_length_of_a_resumed_sampler_is_that_of_the_complete_run():
    assert len(sampler(first_step=5)) == 9


def test_without_a_seed_blocks_come_in_the_order_of_the_file_and_around_again():
    assert sum(sampler(seed=None, num_steps=4), []) == [i % 11 for i in range(16)]


def test_one_step_larger_than_the_corpus_repeats_blocks():
    (step,) = sampler(num_blocks=3, blocks_per_step=6, num_steps=1)
    assert sorted(step) == [0, 0, 1, 1, 2, 2]


# From Python 3.12 on, fork warns where threads run; the worker only copies blocks.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_gives_the_samplers_blocks_as_int64(num_workers):
    blocks = np.arange(33, dtype=np.int32).reshape(11, 3)
    batches = list(BlockLoader(blocks, sampler(), num_workers, pin_memory=False))
    for batch, indices in zip(batches, sampler(), strict=True):
        assert batch.dtype == torch.int64
        assert batch.tolist() == blocks[indices].tolist()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_worker_ends_on_a_signal_of_its_own_process_only(number):
    loader = BlockLoader(np.zeros((11, 3), np.int32), sampler(), 1, pin_memory=False)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.exitcode is None
    worker.terminate()  # as torch does with workers that do not end by themselves
    worker.join(5)
    assert worker.exitcode == 0
