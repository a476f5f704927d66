"""The public names: each is described, and its examples give what they show."""

import doctest
import importlib
import inspect
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
