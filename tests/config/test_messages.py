"""Messages name keys of the configuration as the command line takes them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]

import groupsae
from groupsae.config.instantiate import CONF

PACKAGE = Path(groupsae.__file__).parent
SAYING = ("UserError", "warn", "show", "say", "log", "print")
# `key=value` of an explanation, an argument in Python, a file's name
NO_KEYS = {"key", "layer", "step", "truncation", "max_length"}
# what notebooks call: messages name arguments of functions, too
IN_PYTHON = ("suite/", "app/notebook.py", "lm/attached.py")
GIVEN = re.compile(r"(?<![\w.+/-])\+*([a-z_]+(?:\.[a-z_0-9]+)*)=(?=[\w<\[{'\"\u2026/])")


def keys_of(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Return every key of every command, and the groups of options."""
    found = set()
    for file in CONF.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        group = file.relative_to(CONF).parts[:-1]
        found |= set(group[:1])
        package = re.match("# @package (\\S+)", text)
        prefix = f"{package[1]}." if package else f"{group[0]}." if group else ""
        prefix = prefix.removeprefix("_global_.")
        found |= set(keys_of(yaml.safe_load(text) or {}, prefix))
    return found


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of all that a file says to users; computed parts become "\u2026"."""
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else call.func
        if getattr(called, "id", called) not in SAYING:
            continue
        for part in (node for given in call.args for node in ast.walk(given)):
            if isinstance(part, ast.JoinedStr):
                pieces = (
                    v.value if isinstance(v, ast.Constant) else "\u2026" for v in part.values
                )
                yield part.lineno, "".join(map(str, pieces))
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.lineno, part.value


def parameters(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_a_key_in_a_message_exists(file: Path, keys: set[str]) -> None:
    known = keys | NO_KEYS
    if str(file.relative_to(PACKAGE)).startswith(IN_PYTHON):
        known |= parameters(file)
    wrong = [
        f"line {line}: {key} in {text!r}"
        for line, text in messages(file)
        for key in GIVEN.findall(text)
        if key not in known and not key.startswith("model.load.")
    ]
    assert not wrong


def test_a_key_that_does_not_exist_is_found(tmp_path: Path, keys: set[str]) -> None:
    (tmp_path / "a.py").write_text(
        "raise UserError(f'is {x}: use last_layer=group, or groups.last_layer={y}. ' 'k=3')"
    )
    found = {key for _, text in messages(tmp_path / "a.py") for key in GIVEN.findall(text)}
    assert found == {"last_layer", "groups.last_layer", "k"}
    assert found - keys == {"last_layer", "k"}
