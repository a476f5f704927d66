"""Full disks, flipped bits, activations that are not finite, clocks that jump, a second run."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.chaos.program import TOKENS_PER_STEP, Done, resumed_from
from tests.helpers.runs import composed, flip_a_bit

pytestmark = pytest.mark.slow


def test_two_runs_into_the_same_folder(expected, program, row):
    first = program()
    gate = first.place / "go"
    running = first.start(step=3, wait=str(gate))
    deadline = time.monotonic() + 120
    while not gate.with_suffix(".waiting").exists():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    second = first.run()
    assert second.status == 2, second.output
    assert f"is in use by process {running.pid} on " in second.output
    assert len(second.output.strip().splitlines()) == 1
    gate.touch()
    assert running.end().status == 0
    assert first.results() == expected
    row(
        "two runs started into the same folder",
        "the second is refused with a sentence, the first continues undisturbed",
        f"refused after {second.seconds:.0f} s; the first equal bit for bit",
    )


# ---- disks ----------------------------------------------------------------------------------

IN_A_SMALL_PLACE = """
place=$1 size=$2; shift 2
mount -t tmpfs -o size=$size none "$place" || exit 77
"$@" 2>&1; echo "status $?"
mount -o remount,size=200m none "$place"
"$@" 2>&1; echo "status $?"
cp -r "$place" "$place.kept"
"""


def in_a_small_place(victim, size: int) -> list[Done] | None:
    """Run a command on a disk of so many bytes, then again with room; None: no mounting here."""
    place = str(victim.output)
    victim.output.mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--mount", "--map-root-user", "bash", "-c", IN_A_SMALL_PLACE]
        + ["small-place", place, str(size), *victim.command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        return None
    shutil.rmtree(place)
    shutil.move(f"{place}.kept", place)
    printed = re.split(r"^status (\d+)$", done.stdout, flags=re.MULTILINE)
    return [Done(int(printed[i + 1]), printed[i], 0) for i in (0, 2)]


def blocks_of(folder) -> int:
    """Return what the files of a folder take on a tmpfs, in bytes."""
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in folder.rglob("*") if f.is_file())


FULL = {}  # share of the disk that was needed -> what could not be written


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_full_disk(share, undisturbed, expected, program, row):
    victim, need = program(), blocks_of(undisturbed.output)
    both = in_a_small_place(victim, int(share * need))
    kind = f"tmpfs of {share:.0%} of what the run needs"
    if both is None:  # no tmpfs can be mounted here: instead, no file may be larger than this
        limit = round(share * max(f.stat().st_size for f in undisturbed.folder.rglob("*.*")))
        kind = f"no file above {limit} bytes (RLIMIT_FSIZE)"
        both = [victim.run(limit=limit), victim.run()]
    full, again = both
    assert full.status == 2, full.output
    assert "Traceback" not in full.output, full.output
    sentence = full.output[full.output.index("error: ") :]
    named = re.search(r"cannot write .*?(/\S+?): .*(No space left on|File too large)", sentence)
    assert named, sentence
    assert again.status == 0, again.output
    assert victim.results() == expected
    FULL[kind] = re.sub(r"^.*/(?=\S)", "", named[1])
    row(
        f"disk full: {kind}",
        "a message with the file and the next step; with space the command resumes, bit for bit",
        f"it stopped at `{FULL[kind]}`; afterwards equal bit for bit",
    )


def test_a_checkpoint_with_a_flipped_bit(expected, program, row):
    victim = program()
    assert victim.run(step=8, send=int(signal.SIGKILL)).status == -signal.SIGKILL
    newest = victim.folder / "checkpoints" / "step=6.ckpt"
    flip_a_bit(sorted(newest.glob("sae-*.safetensors"))[0])
    again = victim.run()
    assert again.status == 0, again.output
    printed = " ".join(again.output.split())
    assert "is damaged (the checksum of sae-0.safetensors is wrong)" in printed
    assert resumed_from(again) == 3
    assert victim.results() == expected
    row(
        "a flipped bit in the newest checkpoint",
        "it is named and set aside, the one before it is used",
        "resumed from step 3 instead of 6; equal bit for bit",
        f"{3 * TOKENS_PER_STEP:,} were trained again",
    )


def test_a_shard_of_the_activation_store_with_a_flipped_bit(program, expected, tmp_path, row):
    if "cache" not in composed([]).data:
        pytest.skip("this version has no activation store")
    store = [f"data.cache={tmp_path / 'store'}", "data.cache_dtype=float32"]
    assert program(*store).run().status == 0
    shard = sorted((tmp_path / "store").rglob("train/**/layer.*.safetensors"))[0]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "store").rglob("layer.*") if f != shard}
    flip_a_bit(shard)
    victim = program(*store)
    done = victim.run()
    assert done.status == 2, done.output
    assert f"{shard} is damaged" in " ".join(done.output.split())
    assert victim.run().status == 0
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())
    assert victim.results() == expected
    row(
        "a flipped bit in a shard of the activation store",
        "the run stops and names the shard; the same command fills it alone again",
        "so; equal bit for bit",
    )


# ---- numbers and clocks ---------------------------------------------------------------------


def test_nan_in_one_layers_activations_stops_the_run(expected, program, row):
    victim = program("log_every=3")
    done = victim.run(nan=8, layer=1)
    assert done.status == 2, done.output
    printed = " ".join(done.output.split())
    assert "the loss is not a finite number at step 8 of 12" in printed
    assert "the activations of layer 1 are not finite in that step" in printed
    assert victim.last_step() == 6
    again = victim.run()
    assert again.status == 0, again.output
    assert victim.results() == expected
    row(
        "NaN in one layer's activations, nonfinite=stop",
        "the run stops, names step, SAE and layer; nothing spoilt is saved",
        "step 8, layer 1 named; without the fault the same command resumes, bit for bit",
    )


def test_nan_in_one_layers_activations_is_skipped(expected, program, row):
    victim = program("nonfinite=skip")
    done = victim.run(nan=8, layer=1)
    assert done.status == 0, done.output
    printed = " ".join(done.output.split())
    assert "a step was left out (nonfinite=skip), the last of them step 8" in printed
    assert "the activations of layer 1 are not finite in that step" in printed
    summary = json.loads((victim.folder / "summary.json").read_text())["groups"]
    hit = {name for name, group in summary.items() if 1 in group["layers"]}
    assert {name: group["skipped"] for name, group in summary.items()} == {
        name: int(name in hit) for name in summary
    }
    found = victim.results()
    for name, value in expected.items():
        if "/" in name:
            assert (found[name] == value) == (name.split("/")[0] not in hit), name
    row(
        "NaN in one layer's activations, nonfinite=skip",
        "the SAE that it concerns leaves that step out, reported and counted",
        "so; all other SAEs equal bit for bit",
    )


def test_clock_and_time_zone_jump(expected, program, row):
    victim = program()
    done = victim.run(clock=True)
    assert done.status == 0, done.output
    assert victim.results() == expected
    summary = json.loads((victim.folder / "summary.json").read_text())
    assert 0 < summary["seconds_training"] < 300
    ledger = json.loads((victim.folder / "ledger.json").read_text())
    assert all(0 <= part["seconds"] < 300 for part in ledger["parts"])
    row(
        "the clock jumps by up to 400 days at every look, the time zone 50 times a second",
        "no result, name, order or duration depends on it",
        "equal bit for bit, durations right",
    )
