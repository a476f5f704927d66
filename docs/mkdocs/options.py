"""Every option of conf/: its default, its comment and what its constructor's docstring has.

Read from the files as they are, with PyYAML and `ast`: nothing of the package is imported, so the
documentation is built without torch.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml
from docstrings import arguments

ROOT = Path(__file__).resolve().parents[2]
INTERNAL = ("defaults", "hydra")  # keys of Hydra's own
# Nodes without a `_target_` whose values still go to a constructor.
READERS = {
    ("train", "stream"): "groupsae.data.activations.ActivationDataModule",
    ("train", "calibration"): "groupsae.training.callbacks.grouping.GroupLayers",
    ("heldout", "evaluation.bootstrap"): "groupsae.evaluation.intervals.Bootstrap",
    ("circuits", "evaluation.circuits.bootstrap"): "groupsae.evaluation.intervals.Bootstrap",
}


@dataclass(frozen=True)
class Option:
    """One key.

    Attributes:
        key: as on the command line, such as `groups.theta`.
        default: as written; `???` must be given.
        comment: next to or above it in the yaml file.
        argument: its description in the constructor's docstring.
    """

    key: str
    default: str
    comment: str
    argument: str

    @property
    def described(self) -> bool:
        """Return whether it has any description."""
        return bool(self.comment or self.argument)


@dataclass
class ConfFile:
    """One yaml file.

    Attributes:
        group: of conf/, such as `groups` or `model/tiny`; empty for a command's own file.
        name: of the file, without `.yaml`.
        about: the comment at its head.
        package: where its keys go, such as `groups`; empty for the top.
        target: import path of what it makes, if that is at its top.
        choices: (group, option) that its defaults list selects in other groups.
        parents: options of the same group that it starts from.
        options: its keys, those of nested nodes too.
    """

    group: str
    name: str
    about: str
    package: str
    target: str
    choices: list[tuple[str, str]] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)

    @cached_property
    def meanings(self) -> dict[str, Option]:
        """Return key -> option."""
        return {option.key: option for option in self.options}


class _Reader:
    """Turns the text of one file into a `ConfFile`."""

    def __init__(self, path: Path, conf: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        where = path.relative_to(conf)
        group = where.parent.as_posix().removeprefix(".")
        about, package = self._head()
        if package is None:
            package = group
        root = yaml.compose(self.text)
        self.top = root.value if isinstance(root, yaml.MappingNode) else []
        values = {key.value: value for key, value in self.top}
        target = values["_target_"].value if "_target_" in values else ""
        self.file = ConfFile(group, path.stem, about, package.replace("/", "."), target)
        self._read_defaults(values.get("defaults"))
        self._read(self.top, self.file.package, target)

    def _head(self) -> tuple[str, str | None]:
        """Return the comment at the head of the file, and the package that it names."""
        comments, package = [], None
        for line in self.lines:
            if not line.startswith("#"):
                break
            text = line.lstrip("#").strip()
            if text.startswith("@package"):
                package = text.split()[1].replace("_global_", "")
            else:
                comments.append(text)
        self.first = len(comments) + (package is not None)  # the first line after the head
        return " ".join(comments), package

    def _read_defaults(self, node: yaml.Node | None) -> None:
        for entry in node.value if isinstance(node, yaml.SequenceNode) else []:
            if isinstance(entry, yaml.MappingNode):
                key, value = entry.value[0]
                words = key.value.split()
                group = words[-1].lstrip("/").partition("@")[0]
                if not group.startswith("hydra") and "optional" not in words:
                    self.file.choices.append((group, value.value))
            elif entry.value != "_self_":
                self.file.parents.append(entry.value.partition("@")[0])

    def _read(self, pairs: list, prefix: str, target: str) -> None:
        described = arguments(target, ROOT) if target else {}
        for key, value in pairs:
            top = prefix == self.file.package
            if key.value.startswith("_") or (top and key.value in INTERNAL):
                continue
            name = f"{prefix}.{key.value}".lstrip(".")
            if isinstance(value, yaml.MappingNode):
                inner = {k.value: v.value for k, v in value.value}.get("_target_", "")
                inner = inner or READERS.get((self.file.name, name), "")
                if not inner and (comment := self._comment(key, value)):
                    self.file.options.append(Option(name, "", comment, ""))
                self._read(value.value, name, inner)
                continue
            default = self.text[value.start_mark.index : value.end_mark.index] or "null"
            self.file.options.append(
                Option(name, default, self._comment(key, value), described.get(key.value, ""))
            )

    def _comment(self, key: yaml.Node, value: yaml.Node) -> str:
        """Return the comment at the end of a key's line, or on the lines above it."""
        row = key.start_mark.line
        line = self.lines[row]
        end = value.end_mark if value.end_mark.line == row else key.end_mark
        found = re.search(r"\s(#.*)$", line[end.column :])
        if found:
            column, lines = line.rindex(found[1]), [found[1]]
            for following in self.lines[row + 1 :]:
                if following.find("#") != column or following[:column].strip():
                    break
                lines.append(following[column:])
        else:
            lines, above = [], row - 1
            while above >= self.first and self.lines[above].strip().startswith("#"):
                if self.lines[above].index("#") != key.start_mark.column:
                    break
                lines.insert(0, self.lines[above].strip())
                above -= 1
        return " ".join(text.lstrip("#").strip() for text in lines)


def read_conf(conf: Path = ROOT / "conf") -> list[ConfFile]:
    """Return every yaml file, those of commands first, with a description of each key.

    A key that only changes another file's value (of the option that it starts from, of an
    experiment) is described by that file, and a file without a comment at its head by its parent.
    """
    paths = sorted(conf.rglob("*.yaml"), key=lambda p: (len(p.relative_to(conf).parts), p))
    files = [_Reader(path, conf).file for path in paths]
    by_name = {(file.group, file.name): file for file in files}
    for file in files:
        if not file.about and file.parents:
            parent = by_name[file.group, file.parents[0]]
            file.about, file.choices = parent.about, [*parent.choices, *file.choices]
        if file.group:
            file.options = [_described(option, file, files) for option in file.options]
    return files


def _described(option: Option, file: ConfFile, files: list[ConfFile]) -> Option:
    if option.described:
        return option
    for other in _elsewhere(option.key, file, files):
        known = other.meanings.get(option.key)
        if known is not None and known.described:
            return Option(option.key, option.default, known.comment, known.argument)
    return option


def _elsewhere(key: str, file: ConfFile, files: list[ConfFile]) -> list[ConfFile]:
    """Return the files that may describe a key of this one, the nearest first."""
    by_name = {(each.group, each.name): each for each in files}
    train = by_name["", "train"]
    near = []
    waiting = [(file.group, parent) for parent in file.parents]
    while waiting:  # what it starts from, and what that starts from
        parent = by_name.get(waiting.pop(0))
        if parent is not None and parent not in near:
            near.append(parent)
            waiting += [(parent.group, each) for each in parent.parents]
    chosen = dict(train.choices) | dict(file.choices)
    group = key.partition(".")[0]
    # for model/tiny/relu that is sae/relu; then what the defaults choose
    names = [(group, file.name), (group, chosen.get(group, ""))]
    near += [by_name[name] for name in names if name in by_name]
    return [*near, train, *(each for each in files if each.group == group)]
