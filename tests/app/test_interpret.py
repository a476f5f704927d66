"""The command that looks into latents: what it leaves behind, resumes, and refuses."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.app.interpret import interpret
from groupsae.interpretation import reading, text
from groupsae.interpretation.files import Interpretation
from groupsae.runtime.errors import UserError
from groupsae.runtime.signals import Stopped
from tests.helpers.evaluated import evaluated
from tests.helpers.runs import composed, config_of

DOWN = (
    "interpretation.judge=endpoint interpretation.endpoint.url=http://127.0.0.1:9/v1 "
    "interpretation.endpoint.model=m interpretation.endpoint.retries=0"
)
OPTIONS = ["interpretation.score_tokens=1024", "interpretation.latents=4"]


@pytest.fixture(scope="module")
def ordinary(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated("ordinary", tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(ordinary: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ordinary, tmp_path / "run"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "groupsae.interpret", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def interpreted(folder: Path, *options: str) -> Interpretation:
    """Interpret a run in this process."""
    options = [o for o in [*OPTIONS, *options] if o.startswith("interpretation.")]
    interpret(folder, config_of(folder), composed(options).interpretation, "cpu")
    return Interpretation(folder / "interpretation")


def same(one: Interpretation, other: Interpretation) -> bool:
    return one.head["key"] == other.head["key"] and all(
        torch.equal(value, other.saes[name]._tensors[key])
        and all(
            np.array_equal(sae.firings(layer, latent), other.saes[name].firings(layer, latent))
            for layer in sae.layers
            for latent in map(int, sae.latents)
        )
        for name, sae in one.saes.items()
        for key, value in sae._tensors.items()
    )


def test_the_command_writes_a_page_and_is_not_repeated(copy: Path) -> None:
    done = command(f"run={copy}", *OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "of memory for contexts, counts and firings" in done.stdout
    assert "Latents explained by rules" in done.stdout
    folder = copy / "interpretation"
    page = (folder / "index.html").read_text()
    assert page.count("<script") > 3
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not (folder / "collecting").exists()
    before = (folder / "collected" / "collected.json").stat().st_mtime_ns
    again = command(f"run={copy}", *OPTIONS)
    assert again.returncode == 0
    assert "collected before" in again.stdout
    assert (folder / "collected" / "collected.json").stat().st_mtime_ns == before


def test_firings_are_those_that_the_evaluation_counts(ordinary: Path, copy: Path) -> None:
    """Both read the same held-out blocks."""
    found = interpreted(copy)
    for name, sae in found.saes.items():
        counted = np.load(ordinary / "evaluation" / "latents" / f"{name}.npz")
        for row, layer in enumerate(counted["layers"].tolist()):
            assert sae.fired(layer)[text.SCORE].tolist() == counted["fired"][row].tolist()


def test_a_stopped_pass_resumes_to_the_same_result(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PART", 256)
    undisturbed = interpreted(Path(shutil.copytree(copy, tmp_path / "other")))
    update: Callable[..., None] = reading.Pass.update
    parts: list[int] = []

    def stop(self: reading.Pass, part: text.Part) -> None:
        update(self, part)
        parts.append(part.number)
        if "collecting" in str(self.folder) and part.number == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reading.Pass, "update", stop)
    with pytest.raises(Stopped):
        interpreted(copy)
    assert (copy / "interpretation" / "collecting" / "0" / "state.json").exists()
    parts.clear()
    resumed = interpreted(copy)
    assert 2 not in parts  # (the trial that estimates the time reads part 0)
    assert same(resumed, undisturbed)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(copy: Path, tmp_path: Path) -> None:
    alone = interpreted(Path(shutil.copytree(copy, tmp_path / "other")))
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launched, "-m", "groupsae.interpret", f"run={copy}", *OPTIONS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert same(Interpretation(copy / "interpretation"), alone)


def test_a_single_process_of_several_collects_alone(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after training under torchrun with interpret=true: the others do not come."""
    alone = interpreted(Path(shutil.copytree(copy, tmp_path / "other")))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert same(interpreted(copy), alone)


def test_a_dry_run_leaves_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = composed(OPTIONS).interpretation
    interpret(copy, config_of(copy), options, "cpu", dry_run=True)
    printed = capsys.readouterr().out
    assert "on disk, about" in printed
    assert re.search(r"Rules: \d+ explanations at most, about ", printed)
    assert not (copy / "interpretation").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("interpretation.score_tokens=32", "0 blocks of 64 tokens"),
        ("interpretation.groupings=complete-9", "interpretation.groupings names complete-9"),
        ("interpretation.sample=3", "must be an integer of at least 10"),
        (DOWN, "http://127.0.0.1:9/v1 does not answer"),  # before anything is collected
    ],
)
def test_bad_options_are_refused_in_one_sentence(copy: Path, option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        interpreted(copy, *option.split())
    assert not (copy / "interpretation").exists()
