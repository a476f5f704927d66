"""The store of activations: what is written, read, verified, and shared between processes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from groupsae.data.store import fill
from groupsae.data.store.read import read_ahead
from groupsae.data.store.store import ActivationStore
from groupsae.files.locks import try_lock
from groupsae.lm.hooked import HookedLM
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from tests.helpers.data_modules import CONTEXT, data_module
from tests.helpers.lms import frozen

D_MODEL, LAYERS, STEP = 32, 4, 4
SLOTS = [[0, 1], [2], [1, 2, 3], [3]]
BLOCK = CONTEXT * D_MODEL * 4  # bytes of a float32 block
SIZES = {"blocks_per_step": STEP, "blocks_per_forward": 3, "heldout_tokens": 2 * STEP * CONTEXT}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two steps in a chunk: five of them for nine steps."""
    monkeypatch.setattr(fill, "CHUNK_BYTES", 2 * STEP * BLOCK)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    """Return one model for all, whose tokenizer is read once."""
    shared = frozen(tiny_lm)
    tokenizer = shared.tokenizer()
    shared.tokenizer = lambda: tokenizer
    return shared


@pytest.fixture
def make_data(lm, tiny_text, cache, tmp_path):
    """Return a function that gives a data module, with a store unless dtype is None."""

    def make(dtype="float32", steps=9, **changes):
        store = None if dtype is None else (str(tmp_path / "store"), dtype)
        values = SIZES | {"tokens": steps * STEP * CONTEXT, "store": store} | changes
        return data_module(lm, tiny_text, cache, slots=SLOTS, **values)

    return make


@pytest.fixture
def forwards(monkeypatch):
    """Return the list of forwards of the language model, by the number of blocks."""
    ran, run = [], HookedLM.run

    def counted(self, inputs, *args, **kwargs):
        ran.append(len(inputs["input_ids"]))
        return run(self, inputs, *args, **kwargs)

    monkeypatch.setattr(HookedLM, "run", counted)
    return ran


def files(data) -> dict[Path, tuple[int, int]]:
    """Return the files of a store, with what changes when one is rewritten."""
    found = {path: path.stat() for path in data.reader.store.folder.glob("*/*/*.safetensors")}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def training_batches(data):
    return [
        data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
        for batch in data.train_dataloader()
    ]


def same_batches(first, second):
    assert len(first) == len(second) > 0
    for mine, other in zip(first, second, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def validation_parts(data):
    data.trainer.training = False
    return [
        part
        for batch in data.val_dataloader()
        for part in data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
    ]


FILTERS = [
    {},
    {"exclude_special_tokens": True, "skip_positions": 2},
    {"max_norm_ratio": 1.05},
    {"exclude_special_tokens": True, "max_norm_ratio": 1.05, "num_workers": 3},
    {"layers_per_token": 2, "skip_positions": 2},
]


@pytest.mark.parametrize("filters", FILTERS, ids=["all", "tokens", "norms", "both", "rows"])
def test_batches_from_a_store_are_those_of_the_stream(make_data, filters):
    stored, streamed = make_data(**filters), make_data(None, **filters | {"num_workers": 0})
    stored.reader.fill_calibration(3 * STEP * CONTEXT)
    stored.reader.fill_training()
    same_batches(training_batches(stored), training_batches(streamed))
    same_batches(validation_parts(stored), validation_parts(streamed))
    tokens = 3 * STEP * CONTEXT
    calibration = [list(data.calibration_batches(tokens)) for data in (stored, streamed)]
    same_batches(*calibration)
    assert stored.blocks_seen == streamed.blocks_seen == 9 * STEP
    (first,) = [data.first_rows(SLOTS, 1)() for data in (stored,)]
    assert torch.equal(first.acts, streamed.first_rows(SLOTS, 1)().acts)


def test_filters_do_not_matter_to_what_is_stored(make_data, forwards):
    make_data().reader.fill_training()
    ran = len(forwards)
    make_data(skip_positions=3).reader.fill_training()
    assert len(forwards) == ran > 0


def test_two_processes_read_what_one_reads(make_data):
    make_data(blocks_per_forward=2).reader.fill_training()
    one = training_batches(make_data(blocks_per_forward=2))
    halves = [training_batches(make_data(rank=r, world_size=2)) for r in range(2)]
    for both, *parts in zip(one, *halves, strict=True):
        assert torch.equal(torch.cat([part.acts for part in parts], 1), both.acts)
        assert torch.equal(torch.cat([part.layers for part in parts], 1), both.layers)


def test_a_file_is_a_safetensors_file_that_says_what_is_in_it(make_data):
    data = make_data()
    data.reader.fill_training()
    seen = []
    for path in data.reader.store.folder.glob("train/*/layer.02.safetensors"):
        held = load_file(path)
        assert held["acts"].shape == (len(held["blocks"]), CONTEXT, D_MODEL)
        for block, acts in zip(held["blocks"].tolist(), held["acts"], strict=True):
            assert torch.equal(data.reader.store.read("train", block, 2), acts)
            seen.append(block)
    assert sorted(seen) == sorted(data.needed("train", 9))
    assert len(seen) == 9 * STEP


def test_what_is_stored_can_be_gone_through_with_its_tokens(make_data):
    data = make_data()
    data.reader.fill_training()
    opened, found = ActivationStore(data.reader.store.folder), 0
    for block, acts in opened.iterate("heldout", layer=1):
        tokens = torch.from_numpy(data.blocks.blocks["heldout"][block].astype("int64"))
        expected = data.activations(tokens[None], [[1]]).acts[0]
        torch.testing.assert_close(acts, expected, rtol=1e-4, atol=1e-4)  # a forward of one block
        found += 1
    assert found == 2 * STEP
    with pytest.raises(KeyError, match="block .* of train at layer 1"):
        opened.read("train", min(set(range(99)) - set(opened.blocks("train", 1))), 1)


def test_a_full_store_needs_no_model(make_data, monkeypatch):
    make_data().reader.fill_training()
    monkeypatch.setattr(FrozenLM, "load", lambda *_: pytest.fail("the model was loaded"))
    data = make_data()
    data.reader.fill_training()
    assert len(training_batches(data)) == 9
    assert data.reported == []


def test_more_tokens_and_more_layers_write_only_what_is_missing(make_data, forwards):
    first = make_data(steps=4)
    first.set_slots([[0, 1]])
    first.reader.fill_training()
    before, ran = files(first), len(forwards)
    more = make_data(steps=9, max_tokens=20_000_000)
    more.set_slots([[0, 1]])
    assert more.reader.store.folder == first.reader.store.folder
    more.reader.fill_training()
    after = files(more)
    assert {path: after[path] for path in before} == before
    assert sum(forwards[ran:]) == 5 * STEP
    layers = make_data(steps=9)
    layers.set_slots([[0, 1, 2]])
    layers.reader.fill_training()
    new = set(files(layers)) - set(after)
    assert {path.name for path in new} == {"layer.02.safetensors"}


def test_a_broken_off_filling_resumes_and_rewrites_nothing(make_data, monkeypatch):
    written, write = [], fill.write_shard

    def broken_off(path, blocks, acts):
        if len(written) == 6:
            path.with_suffix(".0123.tmp").write_bytes(b"half")  # as a kill leaves it
            raise KeyboardInterrupt
        written.append(path)
        write(path, blocks, acts)

    with monkeypatch.context() as patch:
        patch.setattr(fill, "THREADS", 1)
        patch.setattr(fill, "write_shard", broken_off)
        with pytest.raises(KeyboardInterrupt):
            make_data().reader.fill_training()
    data = make_data()
    before = files(data)
    assert set(written) <= set(before)
    assert list(data.reader.store.folder.glob("*/*/*.tmp"))
    data.reader.fill_training()
    after = files(data)
    assert {path: after[path] for path in before} == before
    assert not list(data.reader.store.folder.rglob("*.tmp"))
    same_batches(training_batches(data), training_batches(make_data(None)))


def flip(path: Path, place: int) -> None:
    """Turn a bit of a byte around; a negative place counts from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_damaged_block_stops_the_run_and_its_file_alone_is_filled_again(
    make_data, forwards, workers
):
    first = make_data()
    first.reader.fill_training()
    path = sorted(first.reader.store.folder.glob("train/*/layer.01.safetensors"))[1]
    blocks = len(load_file(path)["blocks"])
    flip(path, -5)
    before = files(first)
    with pytest.raises(UserError, match=f"{path} is damaged .the checksum of block .*again"):
        training_batches(make_data(num_workers=workers))
    assert set(before) - set(files(first)) == {path}
    ran, data = len(forwards), make_data()
    data.reader.fill_training()
    assert sum(forwards[ran:]) == blocks
    after = files(data)
    assert after.keys() == before.keys()
    assert {p for p, stat in after.items() if stat != before[p]} == {path}
    same_batches(training_batches(data), training_batches(make_data(None)))


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (lambda path: flip(path, 3), "header"),
        (lambda path: flip(path, 40), ""),
        (lambda path: flip(path, -(2 * STEP * BLOCK) - 20), "the checksum of its record is wrong"),
        (lambda path: os.truncate(path, path.stat().st_size - 7), "header"),
        (lambda path: path.write_bytes(b""), "header"),
    ],
)
def test_a_file_that_is_not_complete_is_noticed_on_opening_and_filled_again(
    make_data, damage, how
):
    first = make_data()
    first.reader.fill_training()
    path = min(first.reader.store.folder.glob("train/*/layer.03.safetensors"))
    damage(path)
    before, data = files(first), make_data()
    data.reader.fill_training()
    assert any(f"{path} is damaged" in sentence and how in sentence for sentence in data.reported)
    assert {p for p, stat in files(data).items() if stat != before[p]} == {path}
    same_batches(training_batches(data), training_batches(make_data(None)))


def test_a_damaged_file_that_this_run_does_not_write_is_named_once(make_data):
    data = make_data()
    path = data.reader.store.folder / "train" / "other" / "layer.01.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    data.reader.fill_training()
    assert any(f"{path} is damaged" in sentence for sentence in data.reported)
    assert not path.exists()


def test_a_damaged_file_that_another_process_wrote_again_is_kept(make_data):
    first = make_data()
    first.reader.fill_training()
    path = min(first.reader.store.folder.glob("train/*/layer.01.safetensors"))
    content = path.read_bytes()
    path.write_bytes(b"")
    late = make_data(steps=10)
    assert [damaged.path for damaged in late.reader.store.damaged] == [path]
    path.write_bytes(content)
    before = files(first)
    late.reader.fill_training()
    after = files(first)
    assert {p: after[p] for p in before} == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("opening", [True, False])
def test_a_file_that_may_not_be_read_does_not_count_as_damaged(
    make_data, monkeypatch, number, opening, forwards
):
    data, opened = make_data(), Path.open
    data.reader.fill_training()
    path = min(data.reader.store.folder.glob("train/*/layer.01.safetensors"))
    before, ran = files(data), len(forwards)

    def refused(self, *args, **kwargs):
        if self == path:
            raise OSError(number, os.strerror(number))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=f"cannot read {path}: {os.strerror(number)}.*again"):
        training_batches(make_data() if opening else data)
    assert files(data) == before
    assert len(forwards) == ran


def test_what_will_be_written_is_announced(make_data):
    data = make_data()
    data.reader.fill_training()
    folder = data.reader.store.folder
    assert data.reported == [
        "activations of 4 layers for 576 train tokens and 128 heldout tokens: 360 kB to write "
        f"into {folder}."
    ]
    data.reader.fill_training()
    assert len(data.reported) == 1


def test_a_chunk_stays_one_processs_to_write_when_another_has_just_ended(tmp_path):
    """Who waits with the lock file of the first one open still excludes a third."""
    with try_lock(tmp_path) as mine:
        assert mine
        before = (tmp_path / "lock").stat().st_ino
    with try_lock(tmp_path) as mine:
        assert mine
    assert (tmp_path / "lock").stat().st_ino == before


def test_a_disk_that_is_too_small_is_refused_with_figures(make_data, monkeypatch):
    free = fill.RESERVE + 100_000
    monkeypatch.setattr(fill.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    data = make_data()
    # 9 steps and 2 of validation, 4 layers: 11 * 4 * 4 * 2048 bytes
    message = r"take 360 kB, but .*store.* has room for 100 kB: .*bfloat16.*data\.cache=null"
    with pytest.raises(UserError, match=message):
        data.reader.fill_training()
    # one step of calibration would have room, but not what comes afterwards
    with pytest.raises(UserError, match=r"take \d+\.?\d* kB, and at least \d+ kB more afterwards"):
        data.reader.fill_calibration(STEP * CONTEXT)
    assert files(data) == {}


def test_a_full_disk_is_a_sentence_and_the_same_command_resumes(make_data, monkeypatch):
    calls, fsync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        fsync(handle)

    data = make_data()
    assert data.reader.store.folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr("groupsae.files.atomic.os.fsync", full)
        with pytest.raises(UserError, match="No space left on device.* same command again"):
            data.reader.fill_training()
    before = files(data)
    assert before
    assert not list(data.reader.store.folder.glob("*/*/*.tmp"))
    data = make_data()
    data.reader.fill_training()
    assert {path: files(data)[path] for path in before} == before
    same_batches(training_batches(data), training_batches(make_data(None)))


def test_float16_that_is_too_small_for_the_activations_is_refused(make_data, monkeypatch):
    run = HookedLM.run

    def larger(self, inputs, layers, visit, stop):
        return run(self, inputs, layers, lambda x, acts: visit(x, acts * 1e6), stop)

    monkeypatch.setattr(HookedLM, "run", larger)
    with pytest.raises(UserError, match=r"float16 ends at 65,504, and layer \d has larger"):
        make_data("float16").reader.fill_training()
    make_data("bfloat16").reader.fill_training()


def test_a_chunk_that_another_process_writes_is_waited_for(make_data, monkeypatch):
    monkeypatch.setattr(fill, "PAUSE", 0.05)
    data = make_data()
    order = data.needed("train", 9)
    (gap,) = data.reader.store.gaps("train", order[: 2 * STEP], [0, 1, 2, 3])
    folder = data.reader.store.chunk_folder(gap)
    folder.mkdir(parents=True)
    other = subprocess.Popen(
        [
            sys.executable, "-c",
            "import fcntl, sys, time\nhandle = open(sys.argv[1], 'w')\n"
            "fcntl.lockf(handle, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(60)",
            str(folder / "lock"),
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with try_lock(folder) as mine:
        assert not mine

    def killed(sentence):  # as soon as everything else is written
        data.reported.append(sentence)
        if "waiting for it" in sentence:
            assert len(list(data.reader.store.folder.glob("train/*/*.safetensors"))) == 4 * 4
            other.kill()

    data.keep_in(str(data.reader.store.folder.parent), "float32", killed)
    data.reader.fill_training()
    other.wait()
    other.stdout.close()
    assert "waiting for it" in data.reported[-1]
    assert len(list(folder.glob("*.safetensors"))) == 4


@pytest.mark.slow
def test_two_processes_fill_one_store_and_one_of_them_is_killed(make_data, tmp_path):
    """Each begins at another end; what the killed one completed stays, the other does the rest."""
    script = tmp_path / "fill.py"
    script.write_text(KILLED)
    data = make_data()
    place = [str(data.lm.path), str(data.source.path), str(data.cache), str(tmp_path / "store")]
    command = [sys.executable, str(script), *place]
    child = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert child.returncode == -signal.SIGKILL
    before = files(data)
    assert before
    assert list(data.reader.store.folder.glob("*/*/*.tmp"))
    data = make_data()
    data.reader.fill_training()
    assert {path: files(data)[path] for path in before} == before
    same_batches(training_batches(data), training_batches(make_data(None)))


KILLED = """
import os, signal, sys
from groupsae.data.store import fill
from tests.helpers.data_modules import data_module
from tests.helpers.lms import frozen

lm, text, cache, store = sys.argv[1:]
fill.CHUNK_BYTES = 2 * 4 * 16 * 32 * 4
data = data_module(
    frozen(lm), text, cache, slots=[[0, 1], [2], [1, 2, 3], [3]], store=(store, "float32"),
    blocks_per_forward=3, tokens=9 * 4 * 16, heldout_tokens=2 * 4 * 16,
)
fsync, count = os.fsync, []

def killed(descriptor):
    count.append(descriptor)
    if len(count) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = killed
data.reader.fill_training()
"""


def test_reading_ahead_keeps_the_order_and_its_bounds():
    begun = []

    def read(item):
        begun.append(item)
        return 10 * item

    ahead = read_ahead(range(8), read)
    assert next(ahead) == 0
    time.sleep(0.05)
    assert max(begun) <= 2
    assert list(ahead) == [10 * item for item in range(1, 8)]

    def fails(item):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        next(read_ahead(range(8), fails))
