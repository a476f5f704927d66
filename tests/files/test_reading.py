"""Damaged files of a run: the message names the file and a way out that works."""

import json
import re
import shutil
from pathlib import Path

import pytest

from groupsae.files.reading import damaged, read_json, require_json
from groupsae.runtime.errors import UserError
from tests.helpers.runs import overrides, run


@pytest.fixture(scope="module")
def finished(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    status, folder = run(overrides(tiny_lm, tiny_text, output))
    assert status == 0
    return folder


def test_a_missing_object_and_another_value_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_json(path) is None
    with pytest.raises(UserError, match=r"x\.json is missing: restore it from a complete copy"):
        require_json(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"is damaged \(it holds a list, not an object\)"):
        read_json(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("evaluation/evaluation.json", "python -m groupsae.evaluate 'run={run}' writes it again"),
        (".hydra/config.yaml", "restore it from a copy, or give the command that started the run"),
        ("ledger.json", "delete it and summary.json and give"),
    ],
)
def test_the_message_depends_on_what_writes_the_file(
    name: str, remedy: str, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    (run / ".hydra").mkdir(parents=True)
    assert remedy.format(run=run) in str(damaged(run / name))
    assert "restore it from a complete copy" in str(damaged(tmp_path / name))


@pytest.mark.parametrize("name", ["groups.json", "saes/layers.3"])
def test_training_writes_a_damaged_file_again(name: str, finished: Path) -> None:
    kept = {path: path.read_bytes() for path in finished.glob("saes/*/*")}
    kept[finished / "groups.json"] = (finished / "groups.json").read_bytes()
    message = " ".join(str(damaged(finished / name)).split())
    resume = re.search(r"python -m groupsae\.train (resume=\S+)", message)
    assert resume is not None
    if (finished / name).is_dir():
        shutil.rmtree(finished / name)
    else:
        (finished / name).unlink()
    (finished / "summary.json").unlink()
    assert run([resume[1]]) == (0, finished)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert json.loads((finished / "summary.json").read_text())["steps"] == 6
    assert (finished / "ledger.json").exists()
