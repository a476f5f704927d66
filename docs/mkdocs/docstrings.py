"""What the docstrings of the package say of arguments, without importing it."""

import ast
import re
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef


def arguments(target: str, root: Path) -> dict[str, str]:
    """Return argument -> what the `Args:` section of a class or function says of it.

    Where it says "see `Base`", that class's words stand in its place, and what a class does not
    explain its bases do. A target outside the package has none.

    Args:
        target: import path, such as `groupsae.sae.topk.TopK`.
        root: of the checkout.
    """
    module, _, name = target.rpartition(".")
    path = root / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return {}
    found = _definitions(path).get(name)
    return {} if found is None else _own_and_inherited(found, path, root)


@cache
def _definitions(path: Path) -> dict[str, ast.stmt]:
    """Return every top-level class and function of a module, and every import in it."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Definition):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {(alias.asname or alias.name): node for alias in node.names}
    return found


def _own_and_inherited(node: ast.stmt, path: Path, root: Path) -> dict[str, str]:
    assert isinstance(node, Definition)
    said: dict[str, str] = {}
    for base in node.bases if isinstance(node, ast.ClassDef) else []:
        if isinstance(base, ast.Name):
            said = _named(base.id, path, root) | said
    for name, text in section(ast.get_docstring(node) or "", "Args").items():
        pointer = re.match(r"see `(\w+)`", text)
        there = _named(pointer[1], path, root).get(name) if pointer else None
        said[name] = there.rstrip(".") + text[pointer.end() :] if pointer and there else text
    return said


def _named(name: str, path: Path, root: Path) -> dict[str, str]:
    """Return the arguments of a class that a module defines or imports from the package."""
    found = _definitions(path).get(name)
    if isinstance(found, ast.ImportFrom):
        return arguments(f"{found.module}.{name}", root)
    return {} if found is None else _own_and_inherited(found, path, root)


def section(docstring: str, title: str) -> dict[str, str]:
    """Return name -> text of one section of a docstring in Google's style, on one line each."""
    body = re.search(rf"^{title}:\n((?:(?: .*)?\n?)*)", docstring, re.MULTILINE)
    said: dict[str, str] = {}
    for line in body[1].splitlines() if body else []:
        start = re.match(r" {4}(\*{0,2}\w+).*?: (.*)", line)
        if start:
            said[start[1]] = start[2]
        elif line.strip() and said:
            last = next(reversed(said))
            said[last] += " " + line.strip()
    return said
