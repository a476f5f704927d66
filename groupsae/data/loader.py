"""Which blocks come in which order: a pure function of the position in the run; and loads them."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # to all processes


def block_order(num_blocks: int, seed: int, start: int, count: int) -> np.ndarray:
    """Return the blocks at places start ... start+count-1 of the endless shuffled sequence.

    Epoch e is a permutation seeded by (seed, e); nothing but the place decides, so any process
    can start anywhere.

    >>> block_order(4, seed=0, start=0, count=8).tolist()
    [2, 0, 1, 3, 3, 0, 2, 1]
    """
    places = np.arange(start, start + count)
    epochs = places // num_blocks
    order = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        permutation = np.random.default_rng([seed, int(epoch)]).permutation(num_blocks)
        order[epochs == epoch] = permutation[places[epochs == epoch] % num_blocks]
    return order


class StepSampler(Sampler[list[int]]):
    """The blocks of every step that fall to one rank.

    Its length is the complete run, while iteration starts at `first_step`: that is what Lightning
    expects of a resumed loader. Without a seed blocks come in the order of the file. Each process
    takes an equal, contiguous share of every step.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        blocks_per_step: int,
        num_steps: int,
        seed: int | None,
        first_step: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.num_blocks, self.blocks_per_step = num_blocks, blocks_per_step
        self.num_steps, self.seed, self.first_step = num_steps, seed, first_step
        share, left = divmod(blocks_per_step, world_size)
        assert not left, f"{blocks_per_step} blocks are no equal shares of {world_size} processes"
        self.mine = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        chunk = 256  # steps drawn together: a permutation is made once per chunk, not per step
        for first in range(self.first_step, self.num_steps, chunk):
            steps = min(chunk, self.num_steps - first)
            start, count = first * self.blocks_per_step, steps * self.blocks_per_step
            if self.seed is None:
                order = np.arange(start, start + count) % self.num_blocks
            else:
                order = block_order(self.num_blocks, self.seed, start, count)
            for step in order.reshape(steps, self.blocks_per_step):
                yield step[self.mine].tolist()


class BlockLoader(DataLoader[Tensor]):
    """Loads the sampler's batches, int64 [blocks, context] each.

    Its workers leave the signals for the run to the run. Ctrl-C, `timeout` and SLURM signal every
    process of a group or job; a worker that ended then would crash the run, which still needs it
    to stop in order. Only SIGTERM from the run itself ends a worker: torch and Python end
    abandoned workers like that.
    """

    def __init__(
        self, blocks: np.ndarray, sampler: StepSampler, num_workers: int, pin_memory: bool
    ) -> None:
        dataset: Any = blocks
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=_stack,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_end_with_the_run,
            # children of the run, which inherit blocked signals; not children of a fork server
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Any:
        """Start the workers, if not yet done, with the signals blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stack(blocks: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(blocks).astype(np.int64))


def _end_with_the_run(_worker: int) -> None:
    """Wait, in a thread of the worker, for a SIGTERM from the process that started it."""

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="sigterm").start()
