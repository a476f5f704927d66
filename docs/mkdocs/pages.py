"""Pages that are made from the configuration and from the package when the site is built."""

import ast
import html
import re
from collections.abc import Iterable
from pathlib import Path

from options import ConfFile, Option

ENTRY_POINTS = "commands"
SAID_ALREADY = 0.5  # share of a comment's words that the docstring has, from which it is left out
VALUE = r"[\w./]+=(?:<[^>]*>|[\w.\[\],/-]*[\w\]])"
COMMAND = rf"python -m [\w.]+\w(?: {VALUE})*"


def options_page(files: list[ConfFile]) -> str:
    """Return the generated part of the configuration page, in Markdown."""
    groups = list(dict.fromkeys(file.group for file in files if file.group))
    parts = ["## Commands"]
    commands = [file for file in files if not file.group]
    commands.sort(key=lambda file: (file.name != "train", file.name))  # the main one first
    parts += [_command(file, files) for file in commands]
    for group in groups:
        parts.append(f"## `{group}` {{#{_anchor(group)}}}")
        members = [file for file in files if file.group == group]
        variants = [file for file in members if _only_names(file)]
        parts += [_option(file) for file in members if file not in variants]
        parts += [_variants(variants)] if variants else []
    return "\n\n".join(parts) + "\n"


def anchor(group: str, name: str) -> str:
    """Return the id of the heading of one file of conf/."""
    return _anchor(f"{group}-{name}" if group else name)


def _anchor(text: str) -> str:
    return "conf-" + text.replace("/", "-").replace(".", "-")


def _only_names(file: ConfFile) -> bool:
    """Return whether a file does no more than name one thing, as those of the Pythias do."""
    return bool(file.parents) and not file.target and len(file.options) == 1


def _command(file: ConfFile, files: list[ConfFile]) -> str:
    rows = []
    for group, default in file.choices:
        names = [each.name for each in files if each.group == group]
        links = ", ".join(f"[{name}](#{anchor(group, name)})" for name in names)
        rows.append([f"`{group}=`", f"`{default}`", links])
    heading = f"### groupsae.{file.name} {{#{anchor('', file.name)}}}\n\n{_text(file.about)}"
    choices = "\n\n" + _table(["group", "default", "options"], rows) if rows else ""
    return heading + choices + "\n\n" + _keys(file.options)


def _option(file: ConfFile) -> str:
    parts = [f"### `{file.group}={file.name}` {{#{anchor(file.group, file.name)}}}"]
    parts += [_text(file.about)] if file.about else []
    if file.target.startswith("groupsae."):
        parts.append(f"Makes [`{file.target.rpartition('.')[2]}`][{file.target}].")
    if file.parents:
        parts.append("Starts from " + ", ".join(f"`{file.group}={p}`" for p in file.parents) + ".")
    if file.choices:
        parts.append("Selects " + ", ".join(f"`{g}={name}`" for g, name in file.choices) + ".")
    parts += [_keys(file.options)] if file.options else []
    return "\n\n".join(parts)


def _variants(files: list[ConfFile]) -> str:
    rows = []
    for file in files:
        also = [f"`{group}={name}`" for group, name in file.choices]
        sets = [f"`{option.key}={option.default}`" for option in file.options]
        name = f'<span id="{anchor(file.group, file.name)}"></span>`{file.group}={file.name}`'
        rows.append([name, "<br>".join(sets + also), _text(file.about)])
    return "### More options\n\n" + _table(["option", "sets", "what it is"], rows)


def _keys(options: Iterable[Option]) -> str:
    rows = []
    for option in options:
        default = "**required**" if option.default == "???" else f"`{option.default}`"
        rows.append([f"`{option.key}`", default if option.default else "", _meaning(option)])
    return _table(["key", "default", "what it is"], rows)


def _meaning(option: Option) -> str:
    """Return the comment and what the docstring says, or only this where it says both."""
    comment, argument = _words(option.comment), _words(option.argument)
    repeated = len(comment & argument) >= SAID_ALREADY * len(comment)
    texts = [option.argument] if argument and repeated else [option.comment, option.argument]
    return "<br>".join(_text(text.rstrip(".") + ".") for text in texts if text)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _text(text: str) -> str:
    """Return prose of a comment or docstring as Markdown that shows it so; commands as code."""
    text = re.sub(rf"(`[^`]*`)|({COMMAND}|{VALUE})", lambda m: m[1] or f"`{m[2]}`", text)
    pieces = re.split(r"(`[^`]*`)", text)
    escaped = (re.sub(r"([*_\[\]])", r"\\\1", html.escape(p, quote=False)) for p in pieces)
    return "".join(p if p.startswith("`") else e for p, e in zip(pieces, escaped, strict=True))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "&#124;") for cell in line) + " |" for line in lines
    )


def api_pages(package: Path) -> dict[str, str]:
    """Return path -> Markdown of the reference: a page for each room, one for what is above them.

    Each names the public modules, which mkdocstrings then reads.
    """
    rooms = sorted(folder.parent for folder in package.glob("*/__init__.py"))
    pages, lines = {}, []
    for room in rooms:
        modules = [room / "__init__.py", *_public(room, "**/*.py")]
        pages[f"api/{room.name}.md"] = _room(room.name, modules, package)
        lines.append(f"| [`{room.name}`]({room.name}.md) | {_first_line(modules[0])} |")
    pages[f"api/{ENTRY_POINTS}.md"] = _room(ENTRY_POINTS, _public(package, "*.py"), package)
    lines.append(f"| [`{ENTRY_POINTS}`]({ENTRY_POINTS}.md) | The commands and what they share. |")
    index = (
        "# API reference\n\nFrom the docstrings, room by room. What `import groupsae` gives:\n\n"
    )
    index += _public_names(package) + "\n\n"
    pages["api/index.md"] = index + "| room | what is in it |\n| --- | --- |\n" + "\n".join(lines)
    return pages


def _public_names(package: Path) -> str:
    """Return a list of the names in `groupsae/__init__.py`, with links to what they are."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    found = []
    for name, home in homes.items():
        path = package.parent / home.replace(".", "/")
        if path.is_dir():  # a room hands on what one of its modules has
            room = ast.parse((path / "__init__.py").read_text(encoding="utf-8"))
            imports = [node for node in room.body if isinstance(node, ast.ImportFrom)]
            home = next(n.module for n in imports if name in {alias.name for alias in n.names})
        found.append(f"- [`groupsae.{name}`][{home}.{name}]")
    return "\n".join(found)


def _public(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("_"))


def _room(name: str, modules: list[Path], package: Path) -> str:
    parts = [f"# {name}"]
    for path in modules:
        dotted = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if path.name == "__init__.py":
            parts.append(_first_line(path))
        else:
            parts.append(f"::: {dotted}")
    return "\n\n".join(parts) + "\n"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
