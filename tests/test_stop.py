"""Processes that were told to stop at different steps end at the same one."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch

from groupsae.training.callbacks.stop import StopOnSignal


@pytest.mark.parametrize("told", [{0: 2}, {1: 2}, {0: 2, 1: 3}, {}])
def test_all_stop_at_the_step_after_one_was_told(
    told: dict[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two threads in step stand for the processes, which know of each other by the sums only."""
    me, barrier, given = local(), Barrier(2), [torch.empty(0)] * 2

    def all_reduce(value: torch.Tensor) -> None:
        given[me.rank] = value.clone()
        barrier.wait(30)
        value.copy_(given[0] + given[1])
        barrier.wait(30)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def process(rank: int) -> list[int]:
        me.rank, saved = rank, []
        stop = StopOnSignal(folder=str(tmp_path))
        trainer = SimpleNamespace(
            world_size=2,
            should_stop=False,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            save_checkpoint=lambda file: saved.append(int(file.stem.split("=")[1])),
        )
        for step in range(6):
            if told.get(rank) == step:
                stop._note(signal.SIGTERM, None)
            trainer.global_step = step
            stop.on_train_batch_end(trainer)  # type: ignore[arg-type]
            if trainer.should_stop:
                break
        assert (stop.received == signal.SIGTERM) == bool(told)
        return saved

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, (0, 1))) == [[3] if told else []] * 2


def test_an_echo_of_a_signal_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended, moments = [], iter([10.0, 11.0, 13.0, 13.0])
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr("groupsae.training.callbacks.stop.time", clock)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    stop = StopOnSignal(folder=str(tmp_path))
    stop._note(signal.SIGTERM, None)
    stop._note(signal.SIGTERM, None)
    assert not ended
    stop._note(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]
