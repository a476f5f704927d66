"""The public names: each is described, and its examples give what they show."""

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import groupsae

PACKAGE = Path(groupsae.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if ">>>" in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_example_gives_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(module, extraglobs={"groupsae": groupsae})
    assert tried > 0
    assert failed == 0


WITHOUT = {"__version__", "load_suite"}


@pytest.mark.parametrize("name", sorted(set(groupsae.__all__) - WITHOUT))
def test_every_public_name_has_an_example(name: str) -> None:
    found = getattr(groupsae, name)
    assert not isinstance(found, ModuleType)
    assert ">>>" in (inspect.getdoc(found) or ""), f"groupsae.{name} shows no example"
