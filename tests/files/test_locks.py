"""A run folder is held by one process until it ends; file systems without locks work as well."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupsae.files.locks import lock_folder, one_at_a_time, try_lock
from groupsae.runtime.errors import UserError

HOLD = """
import os, sys, time
from pathlib import Path
from groupsae.files.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    child = os.fork()  # as a loader's process, which outlives a killed run
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path, holder):
    with pytest.raises(UserError) as refused, lock_folder(tmp_path):
        pass
    message = str(refused.value)
    assert f"{tmp_path} is in use by process {holder.pid} on " in message
    assert ", since 20" in message
    assert "give the same command again" in message
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path):  # though a child of the dead one still lives
        pass


def test_a_process_may_hold_the_folder_again(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path):
            assert [p.name for p in (tmp_path / ".hydra").iterdir()] == ["lock"]


def test_where_files_cannot_be_locked_every_process_may_write(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock_folder(tmp_path), try_lock(tmp_path / "chunk") as ours:
        assert ours


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r"cannot write .*lock: Not a directory\. .*output=")
    with refused, lock_folder(tmp_path / "file"):
        pass


def test_who_waited_finds_what_the_other_made(tmp_path, capfd):
    lock, made = tmp_path / "deep" / "lock", tmp_path / "made"
    code = (
        "import sys, time, pathlib; from groupsae.files.locks import one_at_a_time\n"
        "with one_at_a_time(pathlib.Path(sys.argv[1]), 'at it'):\n"
        "    print('has it', flush=True); time.sleep(0.5); pathlib.Path(sys.argv[2]).touch()"
    )
    waited = []
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock), str(made)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        with one_at_a_time(lock, "at it", lambda: waited.append(time.monotonic())):
            assert made.exists()
    assert waited
    assert capfd.readouterr().err == f"another process is at it: waiting for {lock}\n"
    assert not lock.exists()
