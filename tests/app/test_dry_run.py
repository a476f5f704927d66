"""A dry run prints what a run needs, leaves nothing behind, and is right within 15 %."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from groupsae.app import needs as report
from groupsae.app.needs import too_small
from groupsae.grouping.choices import ByAmad, ByCount
from groupsae.training import estimate
from groupsae.training.estimate import possible_plans
from tests.helpers.dry_runs import count, rows_of
from tests.helpers.runs import overrides, run


@pytest.fixture
def arguments(tiny_lm: Path, tiny_text: Path, tmp_path: Path) -> list[str]:
    return overrides(tiny_lm, tiny_text, tmp_path, "dry_run=true")


def test_nothing_is_packed_measured_or_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, folder = run(arguments)
    assert status == 0
    assert list(tmp_path.iterdir()) == []
    rows = rows_of(capsys.readouterr().out)
    assert rows["tokens per SAE"] == ["3,072"] * 2  # the fewest and the most SAEs
    assert rows["steps"] == ["6", "6"]
    # d_model 32, 64 latents: 2 * 32 * 64 weights and both biases; 2 and 4 SAEs
    one = 2 * 32 * 64 + 32 + 64
    assert rows["parameters"] == [f"{2 * one:,}", f"{4 * one:,}"]
    assert count(rows["optimiser state"][0]) == pytest.approx(2 * 4 * 2 * one, rel=0.01)
    assert not folder.exists()


def test_a_trial_has_a_twentieth_of_the_steps_of_a_run() -> None:
    for num_steps, most in [(6, 3), (100, 5), (400, 20), (10**6, 50)]:
        assert estimate.Trial(5.0, tuple, num_steps).most == most


def test_a_run_that_exists_is_left_alone_and_its_groups_are_known(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = overrides(tiny_lm, tiny_text, tmp_path)
    status, folder = run(arguments)
    assert status == 0
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    capsys.readouterr()
    assert run([*arguments, "dry_run=true", "overwrite=true"])[0] == 0
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")} == before
    rows = rows_of(capsys.readouterr().out)
    assert len(rows["steps"]) == 1
    used = sum(p.stat().st_size for p in folder.glob("checkpoints/**/*") if p.is_file())
    used += sum(p.stat().st_size for p in folder.glob("saes/*/*"))
    # so small that names and manifests weigh as much as weights: they are not counted
    assert 0.5 * used < count(rows["disk: run folder"][0]) < 1.5 * used


def test_the_rule_decides_whether_the_number_of_saes_is_known(tmp_path: Path) -> None:
    by_count = ByCount(num_groups=3, rule="complete", last_layer="own")
    (plan,) = possible_plans(by_count, 8, tmp_path)
    assert len(plan.members) == 4
    by_amad = ByAmad(theta=0.2, rule="complete", last_layer="own")
    # at 6 groups of 7 layers one has two layers, at the farthest: AMAD 1/6
    assert [len(p.members) for p in possible_plans(by_amad, 8, tmp_path)] == [2, 7]
    # and what lies between them is what any distances give
    random = np.random.default_rng(0).uniform(0, 0.5, (8, 8))
    found = by_amad.plan(np.triu(random, 1) + np.triu(random, 1).T)
    assert 2 <= len(found.members) <= 7


def test_saes_that_do_not_fit_are_reported_and_not_tried(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(estimate, "bytes_free", lambda *_: 150_000)
    monkeypatch.setattr(
        estimate,
        "bytes_needed",
        lambda suite, data, widths, n: asked.append(widths) or len(widths) * 50_000,
    )
    assert run(arguments)[0] == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert rows["peak memory, by a trial"][1] == "does not fit"
    assert count(rows["peak memory, by a trial"][0]) > 1e8
    assert "4 SAEs do not fit into the 150 kB free on cpu" in " ".join(printed.split())


def test_stored_activations_are_counted(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *arguments,
        "groups=per_layer",
        f"data.cache={tmp_path}/store",
        "data.cache_dtype=float16",
    ]
    assert run(given)[0] == 0
    assert list(tmp_path.iterdir()) == []
    rows = rows_of(capsys.readouterr().out)
    # 4 layers, 32 wide, 2 bytes: 3,072 tokens to train on, 1,024 held out, 1,024 to calibrate
    assert count(rows["disk: stored activations, at most"][0]) == pytest.approx(
        4 * 32 * 2 * (3072 + 1024 + 1024), rel=0.01
    )


def test_a_disk_that_is_too_small_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders on one disk, there or not yet, need its room together."""
    monkeypatch.setattr(report.shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    places = {tmp_path: 10**9, tmp_path / "not" / "yet": 10**9}
    assert not too_small(places)
    (printed,) = too_small({**places, tmp_path / "more": 2 * 10**9})
    assert f"The disk of {tmp_path} has room for 3.00 GB, and up to 4.00 GB are needed" in printed


def test_with_several_processes_the_busiest_is_reported(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trial goes through, the step with dead latents as well, with all processes' rows."""
    many = ["groups=all", "groups.smaller=[2]", "calibration.scale=none", "dry_run=true"]
    several = ["trainer=sae_parallel", "trainer.accelerator=cpu", "trainer.devices=2"]
    arguments = overrides(tiny_lm, tiny_text, tmp_path, *many)
    assert run(arguments)[0] == 0
    every = [int(cell.replace(",", "")) for cell in rows_of(capsys.readouterr().out)["parameters"]]
    assert run([*arguments, *several])[0] == 0
    printed = capsys.readouterr().out
    busiest = [int(cell.replace(",", "")) for cell in rows_of(printed)["parameters"]]
    for mine, both in zip(busiest, every, strict=True):
        assert both / 2 <= mine < 0.6 * both
    assert "nan" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("expansion", [64, 512])
def test_memory_disk_and_time_are_right_within_15_percent(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, expansion: int
) -> None:
    """Against a run of its own process; time within a factor, as machines are shared."""
    arguments = overrides(
        tiny_lm, tiny_text, tmp_path, f"sae.expansion={expansion}", "groups=per_layer",
        "tokens=51200", "dead_after=100000000", "log_every=50", "eval_every=50",
        "checkpoint_every=50",
    )  # fmt: skip
    printed = []
    for more in ("dry_run=true", "dry_run=false"):
        done = subprocess.run(
            [sys.executable, "-m", "groupsae.train", *arguments, more],
            capture_output=True, text=True, timeout=600, check=True,
        )  # fmt: skip
        printed.append(done.stdout)
    rows = rows_of(printed[0])
    (summary_file,) = tmp_path.rglob("summary.json")
    summary = json.loads(summary_file.read_text())
    peak = summary["peak_memory_gb"] * 2**30
    assert count(rows["peak memory, by a trial"][0]) == pytest.approx(peak, rel=0.15)
    folder = summary_file.parent
    disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert count(rows["disk: run folder"][0]) == pytest.approx(disk, rel=0.15)
    forecast = float(rows["tokens per second, by a trial"][0].replace(",", ""))
    assert 0.5 < forecast / summary["tokens_per_second"] < 2
    assert re.fullmatch(r"\d:\d\d:\d\d", rows["training"][0])
