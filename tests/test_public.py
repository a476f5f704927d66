"""The public names: each is described, and its examples give what they show."""

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import groupsae

PACKAGE = Path(groupsae.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if ">>>" in file.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def at_hand() -> dict[str, Any]:
    """Return what examples may use without making it: SAEs of the bundled model, and the model."""
    configs = {
        name: {"layers": layers, "norm_factors": {str(x): 0.1 for x in layers}, "model": "tiny"}
        for name, layers in (("layers.0-10", list(range(11))), ("layers.11", [11]))
    }
    saes = {name: groupsae.TopK(d_model=128, d_sae=512, k=8) for name in configs}
    suite = groupsae.Suite(saes, configs)
    model, tokenizer = suite.load_model()
    return {"groupsae": groupsae, "suite": suite, "model": model, "tokenizer": tokenizer}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_example_gives_what_it_shows(
    name: str, at_hand: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(module, extraglobs=at_hand)
    assert tried > 0
    assert failed == 0


WITHOUT = {"__version__"}


@pytest.mark.parametrize("name", sorted(set(groupsae.__all__) - WITHOUT))
def test_every_public_name_has_an_example(name: str) -> None:
    found = getattr(groupsae, name)
    assert not isinstance(found, ModuleType)
    assert ">>>" in (inspect.getdoc(found) or ""), f"groupsae.{name} shows no example"


@pytest.mark.slow  # CI does it with the wheel
def test_mypy_understands_a_script_of_a_user(tmp_path: Path) -> None:
    script = Path(__file__).with_name("user_script.py")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=",
         "--warn-unused-ignores", f"--cache-dir={tmp_path}", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 1 source file\n")
    assert (PACKAGE / "py.typed").exists()


def test_every_file_names_the_same_version() -> None:
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text("utf-8"), re.M)
    newest = re.search(r"^## (.+)$", (root / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert cited is not None
    assert newest is not None
    assert cited[1] == newest[1] == project["version"]


def test_the_page_of_the_python_api_has_every_public_name() -> None:
    page = (PACKAGE.parent / "docs" / "python.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"`groupsae\.(\w+)", page))
    assert shown >= set(groupsae.__all__) - {"__version__"}
