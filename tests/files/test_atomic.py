"""Files of a run are complete or unchanged, and a full disk is one sentence."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from groupsae.files.atomic import atomic_write
from groupsae.files.reading import read_metrics
from groupsae.grouping.shares import Shares
from groupsae.runtime.errors import UserError
from groupsae.training.loggers import MetricsCSV
from groupsae.training.measure import Measurement, cached


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, shared):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path, "w", shared=shared) as handle:
        handle.write("old")
    with pytest.raises(TypeError), atomic_write(path, shared=shared) as handle:
        handle.writelines([b"half", None])
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path, monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "summary.json"
    with (
        pytest.raises(UserError, match=r"cannot write .*summary.json: No space left on device"),
        atomic_write(path) as handle,
    ):
        handle.write(b"half")
    assert not list(tmp_path.iterdir())


def test_metrics_that_cannot_be_written_are_a_sentence(tmp_path):
    logger = MetricsCSV(folder=str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=0)
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics.csv: Is a directory"):
        logger.log_metrics({"a": 1.0}, step=1)


def test_a_truncated_value_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,metric,value\r\n1,a,0.25\r\n2,a,0.1")  # of 0.125
    assert read_metrics(path) == [(1, "a", 0.25)]


def test_a_damaged_measurement_in_the_cache_is_measured_again(tmp_path: Path):
    path = tmp_path / "angles.npz"
    distances = np.ones((2, 2))
    norms, shares = np.ones(2), Shares(*[np.ones(2)] * len(Shares._fields))
    made = Measurement(
        distances, norms, norms, 4, {"tokens": 8}, 0.5, shares, distances, np.ones((2, 4))
    )
    made.save(path)
    found = cached(path)
    assert found is not None
    assert np.array_equal(found.distances, distances)
    content = bytearray(path.read_bytes())
    content[content.index(distances.tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Measurement.load(path)
    with pytest.warns(UserWarning, match="is damaged: the layers are measured again"):
        assert cached(path) is None
    assert cached(tmp_path / "none.npz") is None
