"""Checkpoints: complete or not there, verified, the last good one used; and taken apart by SAE."""

import errno
import os
import shutil
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from groupsae.runtime.errors import UserError
from groupsae.training.checkpoints import folder as files
from groupsae.training.checkpoints.folder import put_together, take_apart
from groupsae.training.checkpoints.io import SuiteCheckpoints, check_same_checkpoint
from tests.helpers.processes import together
from tests.helpers.runs import flip_a_bit, overrides, read_checkpoint, run, saved


def made(step: int = 3, num_saes: int = 2) -> dict:
    """Return a checkpoint as Lightning dumps it, of Adam after a step on `num_saes` SAEs."""
    weights = {
        (i, name): torch.nn.Parameter(
            torch.randn(size, generator=torch.Generator().manual_seed(i))
        )
        for i in range(num_saes)
        for name, size in (("sae.W_enc", (3, 4)), ("sae.b_dec", (4,)))
    }
    groups = [
        {"params": [p for (j, _), p in weights.items() if j == i], "name": f"layers.{i}", "lr": lr}
        for i, lr in zip(range(num_saes), (0.1, 1 / 3), strict=True)
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.999))
    sum(p.square().sum() for p in weights.values()).backward()
    adam.step()
    state = {f"groups.{i}.{name}": p.detach() for (i, name), p in weights.items()}
    state |= {f"groups.{i}.tokens_since_fired": torch.arange(3) for i in range(num_saes)}
    ordered = {k: v for i in range(num_saes) for k, v in state.items() if f"groups.{i}." in k}
    return {
        "global_step": step,
        "loops": {"fit_loop": {"batches": step}},
        "callbacks": {"ModelCheckpoint": {"best_k_models": {"a": torch.tensor(1.0)}}},
        "lr_schedulers": [],
        "state_dict": ordered,
        "optimizer_states": [adam.state_dict()],
        "plan": "abc",
    }


def same(one: object, other: object) -> bool:
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def save(checkpoint: dict, path: Path) -> Path:
    SuiteCheckpoints(say=print).save_checkpoint(checkpoint, path)
    return path


def test_what_is_taken_apart_is_put_together_again() -> None:
    checkpoint = made()
    rest, parts = take_apart(checkpoint)
    assert sorted(parts) == [0, 1]
    assert "state_dict" not in rest
    assert same(put_together(rest, parts), checkpoint)


def test_a_saved_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(made(), tmp_path / "step=3.ckpt")
    assert same(read_checkpoint(path), made())
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "sae-0.safetensors",
        "sae-1.safetensors",
        "state.pt",
    ]


def test_one_sae_alone_is_read_and_restores_an_optimiser_of_its_own(tmp_path: Path) -> None:
    path = save(made(), tmp_path / "step=3.ckpt")
    found = SuiteCheckpoints(say=print).load_checkpoint(path, members=[1])
    assert all(name.startswith("groups.1.") for name in found["state_dict"])
    parameters = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(4))]
    adam = torch.optim.Adam([{"params": parameters, "name": "layers.1"}])
    adam.load_state_dict(found["optimizer_states"][0])
    complete = made()["optimizer_states"][0]
    assert adam.param_groups[0]["lr"] == 1 / 3
    for mine, theirs in zip(parameters, complete["param_groups"][1]["params"], strict=True):
        assert torch.equal(adam.state[mine]["exp_avg"], complete["state"][theirs]["exp_avg"])


@pytest.mark.parametrize("victim", ["sae-1.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_the_last_good_one_is_used_and_reported(tmp_path: Path, victim: str, how: str) -> None:
    good, bad = (save(made(step), tmp_path / f"step={step}.ckpt") for step in (3, 12))
    if how == "flipped":
        flip_a_bit(bad / victim)
    elif how == "cut":
        os.truncate(bad / victim, (bad / victim).stat().st_size // 2)
    else:
        (bad / victim).unlink()
    reports: list[str] = []
    found = SuiteCheckpoints(say=reports.append).load_checkpoint(bad)
    assert found["global_step"] == 3
    assert len(reports) == 2
    assert f"{bad} is damaged" in reports[0]
    assert victim in reports[0] or victim == "manifest.json"
    assert reports[1] == f"resuming from {good}"
    assert files.checkpoints(tmp_path) == [good]  # the step can be saved again
    save(made(12), bad)
    assert read_checkpoint(bad)["global_step"] == 12


def test_without_a_complete_one_the_error_says_how_to_start_again(tmp_path: Path) -> None:
    path = tmp_path / "step=3.ckpt"
    save(made(), path)
    (path / "manifest.json").write_text("")
    with pytest.raises(UserError, match="every checkpoint .* is damaged.*overwrite=true"):
        read_checkpoint(path)


def test_steps_are_ordered_as_numbers_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step=9.ckpt", "step=100.ckpt", "step=10.ckpt", "step=6.bak.ckpt", "step=x.ckpt"):
        (tmp_path / name).mkdir()
    assert [p.stem for p in files.checkpoints(tmp_path)] == ["step=100", "step=10", "step=9"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Else the run would begin again from its first step."""

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "listdir", refused)
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: {os.strerror(number)}"):
        files.checkpoints(tmp_path)


def test_a_folder_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert files.checkpoints(tmp_path / "none") == []


def test_the_two_newest_are_kept_whoever_wrote_them(tmp_path: Path) -> None:
    for step in (3, 6, 9, 7):  # the last one: after a resume from an older one
        path = save(made(step), tmp_path / f"step={step}.ckpt")
        assert path.exists()
    assert [p.stem for p in files.checkpoints(tmp_path)] == ["step=9", "step=7"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_that_cannot_read_the_newest_costs_no_more_than_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bad = (save(made(step), tmp_path / f"step={step}.ckpt") for step in (3, 6))
    digest = files.hashlib.file_digest

    def failing(handle: Any, how: str) -> Any:
        if str(handle.name).startswith(str(bad)):
            raise OSError(errno.EIO, "Input/output error")
        return digest(handle, how)

    monkeypatch.setattr(files.hashlib, "file_digest", failing)
    reports: list[str] = []
    assert SuiteCheckpoints(say=reports.append).load_checkpoint(bad)["global_step"] == 3
    assert "is damaged ([Errno 5] Input/output error)" in reports[0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("opening", ["manifest.json", "sae-1.safetensors"])
def test_one_that_cannot_be_read_just_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, opening: str
) -> None:
    both = [save(made(step), tmp_path / f"step={step}.ckpt") for step in (3, 6)]
    opened = Path.open

    def refused(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == both[1] / opening:
            raise OSError(number, os.strerror(number))
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        with pytest.raises(UserError, match=f"cannot read .*step=6.ckpt: {os.strerror(number)}"):
            read_checkpoint(both[1])
    assert files.checkpoints(tmp_path) == both[::-1]
    assert read_checkpoint(both[1])["global_step"] == 6


def test_checkpoints_of_another_grouping_are_not_taken_for_damaged(tmp_path: Path) -> None:
    path = save(made(), tmp_path / "step=3.ckpt")
    with pytest.raises(UserError, match="contains 2 SAEs, but groups.json now asks for others"):
        SuiteCheckpoints(say=print).load_checkpoint(path, members=[1, 5])
    assert path.exists()


KILL = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.training import test_checkpoints as t
from pathlib import Path
from groupsae.training.checkpoints import folder, io
where, count = Path(sys.argv[2]), int(sys.argv[3])
t.save(t.made(3), where / "step=3.ckpt")
left = [count]
def dying(function):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call
for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))
t.save(t.made(6), where / "step=6.ckpt")
io.SuiteCheckpoints(say=print).remove_checkpoint(where / "step=3.ckpt")
print("complete")
"""


def test_killed_at_any_system_call_a_complete_checkpoint_is_left(tmp_path: Path) -> None:
    """os.fsync, mkdir, rename, ... each in turn is where the process ends."""
    seen = set()
    for count in range(1, 40):
        where = tmp_path / str(count)
        where.mkdir()
        child = os.fork()
        if child == 0:  # the modules are loaded already: a fresh interpreter takes seconds
            sys.argv = ["", str(Path(__file__).parents[2]), str(where), str(count)]
            exec(compile(KILL, "kill", "exec"), {})
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        newest = files.checkpoints(where)[0]
        step = read_checkpoint(newest)["global_step"]
        assert newest.stem == f"step={step}"
        seen.add(step)
        save(made(9), where / "step=9.ckpt")  # what was left half written is no obstacle
        assert not list(where.glob("*.partial"))
        if not killed:
            break
    assert seen == {3, 6}
    assert count > 8


def test_a_full_disk_is_a_sentence_and_costs_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(made(3), tmp_path / "step=3.ckpt")
    original = os.fsync

    def full(handle: int) -> None:
        if "sae-1" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*step=6.ckpt: No space left on device"):
        save(made(6), tmp_path / "step=6.ckpt")
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.parametrize("victim", ["sae-1.safetensors", "state.pt"])
def test_so_is_one_that_is_full_in_the_middle_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    good = save(made(3), tmp_path / "step=3.ckpt")

    class Full(FileIO):
        def write(self, content: Any) -> int:
            raise OSError(28, "No space left on device")

    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == victim and "w" in mode:
            return Full(self, mode)
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write .*step=6.ckpt: No space left on device"):
        save(made(6), tmp_path / "step=6.ckpt")
    assert list(tmp_path.iterdir()) == [good]


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_weights(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path))
    assert status == 0
    before = saved(folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "saes")
    newest = folder / "checkpoints" / "step=6.ckpt"
    flip_a_bit(newest / "sae-0.safetensors")
    assert run([f"resume={folder}"])[0] == 0
    reports = capsys.readouterr().out
    assert "the checksum of sae-0.safetensors is wrong" in reports
    assert f"resuming from {newest.with_name('step=3.ckpt')}" in reports
    assert same(saved(folder), before)
    assert read_checkpoint(newest)["global_step"] == 6


def two_processes(place: Path) -> int:
    """Load checkpoints that the second process cannot read, or does not see."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")

    def log(*words: object) -> None:
        sys.stdout.write(" ".join(map(str, words)) + "\n")

    def load(case: str, number: int = 0) -> None:
        opened = Path.open

        def refused(self: Path, *args: Any, **kwargs: Any) -> Any:
            if rank == 1 and number and self.name == "sae-1.safetensors":
                raise OSError(number, os.strerror(number))
            return opened(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", refused)
            try:
                path = place / case / "step=6.ckpt"
                found = SuiteCheckpoints(say=log).load_checkpoint(path, members=[rank])
                log(case, "step", found["global_step"], *{n[:8] for n in found["state_dict"]})
            except UserError as error:
                log(case, error)

    load("damaged")
    load("forbidden", errno.EACCES)
    load("missing", errno.ENOENT)
    check_same_checkpoint(place, place)
    try:
        check_same_checkpoint(place if rank == 0 else None, place)
    except UserError as error:
        log("unseen", error)
    torch.distributed.destroy_process_group()
    return 0


def test_two_processes_agree_on_the_checkpoint(tmp_path: Path) -> None:
    """A file is damaged, cannot be read, or is not seen by the second process only."""
    for case in ("damaged", "forbidden", "missing"):
        for step in (3, 6):
            save(made(step), tmp_path / case / f"step={step}.ckpt")
    flip_a_bit(tmp_path / "damaged" / "step=6.ckpt" / "sae-1.safetensors")
    ended = together(two_processes, 2, tmp_path / "log", tmp_path)
    for rank, (status, output) in enumerate(ended):
        assert status == 0, output
        assert f"damaged step 3 groups.{rank}" in output
        damage = "is damaged (the checksum of sae-1.safetensors is wrong)"
        assert (damage in output) == (rank == 0)
        assert f"cannot read the checkpoint {tmp_path}/forbidden/step=6.ckpt: Perm" in output
        assert f"cannot read the checkpoint {tmp_path}/missing/step=6.ckpt: No such f" in output
        assert f"unseen process 1 of this run does not see the checkpoints in {tmp_path}" in output
    assert (tmp_path / "forbidden" / "step=6.ckpt").exists()
    assert (tmp_path / "missing" / "step=6.ckpt").exists()
