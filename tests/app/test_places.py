"""Folders of a run: where it is written, and that its model and text are found again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from groupsae.app.run_folder import open_run, run_folder
from groupsae.config.arguments import read
from groupsae.runtime.errors import UserError
from tests.helpers.evaluated import evaluate
from tests.helpers.runs import composed, config_of, overrides, run

QUICK = ("evaluation.bootstrap.resamples=2", "evaluation.similarity_tokens=64")


def opened_in(arguments: list[str]) -> Path:
    with open_run(composed(arguments), arguments) as opened:
        return opened.folder


@pytest.fixture
def moved(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """Return a folder with a run that was made in it with relative paths, and its arguments."""
    here = tmp_path / "here"
    shutil.copytree(tiny_lm, here / "models" / "lm")
    shutil.copytree(tiny_text, here / "corpus")
    monkeypatch.chdir(here)
    arguments = overrides(Path("models/lm"), Path("corpus"), Path("out"))
    return here, arguments


def test_a_run_with_relative_paths_is_resumed_and_evaluated_from_anywhere(
    moved: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, arguments = moved
    status, folder = run(arguments)
    assert status == 0
    assert not folder.is_absolute()
    assert folder == run_folder(composed(arguments))  # named by what was given, as always
    cfg = config_of(folder)
    assert (cfg.model.name, cfg.data.path) == (f"{here}/models/lm", f"{here}/corpus")
    assert cfg.resume is None

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    evaluation = evaluate(here / folder, *QUICK)
    assert evaluation["model"] == f"{here}/models/lm"
    assert not list(elsewhere.iterdir())

    there = tmp_path / "there"
    here.rename(there)
    with pytest.raises(
        UserError, match="data.path=.*corpus does not exist"
    ):  # before slow imports
        evaluate(there / folder)
    places = [f"model.name={there}/models/lm", "data.path=../there/corpus"]
    assert evaluate(there / folder, *QUICK, *places)["ce"] == evaluation["ce"]
    (there / folder / "summary.json").unlink()
    arguments = [f"resume={there / folder}", f"++{places[0]}", f"++{places[1]}"]
    assert read([f"resume={there / folder}", *places], "train") == arguments
    assert run(arguments) == (0, there / folder)
    assert config_of(there / folder).data.path == f"{there}/corpus"
    assert not list(elsewhere.iterdir())

    (there / "corpus" / "000.txt").write_text("other words\n" * 200)
    with pytest.raises(UserError, match="packed text .*but data now gives"):
        evaluate(there / folder, *places)
    with pytest.raises(UserError, match=r"data\.name=x: the run in .* has no data\.name"):
        evaluate(there / folder, "data.name=x")


@pytest.mark.parametrize(
    ("name", "part"), [(".", "lm"), ("..", "models"), ("../lm/", "lm"), ("sub/..", "lm")]
)
def test_a_run_is_named_by_the_resolved_folder_of_its_model_and_stays_in_output(
    name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models" / "lm"
    (model / "sub").mkdir(parents=True)
    monkeypatch.chdir(model)
    folder = run_folder(composed([f"output={tmp_path}/out", "model=hf", f"model.name={name}"]))
    assert folder.relative_to(tmp_path / "out").parts[0] == part


def test_a_revision_of_a_folder_is_refused(tiny_lm: Path, tiny_text: Path, tmp_path: Path) -> None:
    arguments = overrides(tiny_lm, tiny_text, tmp_path / "out")
    others = [each for each in arguments if not each.startswith("data")]
    stored = ["data=hf", f"data.name={tiny_text}", "data.revision=main"]
    for key, given in {
        "model.revision=step1000": [*arguments, "model.revision=step1000"],
        "data.revision=main": [*others, *stored],
        "model.revision=x": [f"output={tmp_path / 'out'}", "model.revision=x"],  # the bundled one
    }.items():
        with pytest.raises(UserError, match=f"{key} chooses a revision on the Hub, but"):
            opened_in(given)
    assert not (tmp_path / "out").exists()


def test_a_run_with_odd_names_and_an_ascii_screen_that_closes_is_complete(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Its printed commands can be pasted, from the same folder."""
    text, lm = tmp_path / "exp[v2] (1)" / "a=b,c", tmp_path / "lm"
    text.parent.mkdir()
    text.symlink_to(tiny_text)
    lm.symlink_to(tiny_lm)
    arguments = overrides(Path("lm"), text.relative_to(tmp_path), Path("~out [x], 'y' (1)"))
    program = [sys.executable, "-m", "groupsae.train", *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        program, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read().decode("ascii")
        assert process.wait() == 0, stderr
    assert b"4 layers" in first
    (summary,) = tmp_path.rglob("summary.json")
    assert "~out [x], 'y' (1)/cache/tokens" in stderr
    assert summary.is_relative_to(tmp_path / "~out [x], 'y' (1)" / "lm")

    summary.unlink()
    folder = summary.parent.relative_to(tmp_path)
    refused = subprocess.run(
        [sys.executable, "-m", "groupsae.evaluate", f'run="{folder}"'],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    pasted = refused.stderr.splitlines()[-1].strip()
    assert pasted.startswith("python -m groupsae.train ")
    done = subprocess.run(
        pasted.replace("python", sys.executable, 1),
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert summary.exists()
    assert f"Run folder: {folder}" in done.stdout
