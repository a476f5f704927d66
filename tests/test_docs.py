"""The documentation cannot rot: options are described, commands compose, links lead somewhere."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from groupsae.app.run_folder import register_resolver
from groupsae.config.arguments import with_parts

ROOT = Path(__file__).parent.parent
CONF, DOCS = ROOT / "conf", ROOT / "docs"
BORROWED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "groupsae/models/tiny/README.md")
PAGES = [*(ROOT / name for name in BORROWED), *sorted(DOCS.glob("*.md"))]
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
# files that the pages tell the reader to write
OWN = {("model", "mine"), ("experiment", "gpt2")}
FILE = r"\.(?:jsonl?|safetensors|npz|md|py|yaml)\b"


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


page = pytest.mark.parametrize("path", PAGES, ids=named)


@pytest.fixture(scope="module")
def made() -> Iterator[ModuleType]:
    """Return the generator of the configuration page, as the build imports it."""
    sys.path.insert(0, str(DOCS / "mkdocs"))
    yield importlib.import_module("options")
    sys.path.remove(str(DOCS / "mkdocs"))


# ---- the configuration page --------------------------------------------------------------------


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node:
        at_top = not prefix
        if str(key).startswith("_") or (at_top and key in ("defaults", "hydra")):
            continue
        name = f"{prefix}{key}"
        if isinstance(node, DictConfig) and isinstance(node._get_node(key), DictConfig):
            yield from leaves(node._get_node(key), f"{name}.")
        else:
            yield name


def test_the_page_has_every_key_of_every_file(made):
    files = {(file.group, file.name): file for file in made.read_conf()}
    paths = sorted(CONF.rglob("*.yaml"))
    assert len(files) == len(paths) > 20
    for path in paths:
        file = files[path.parent.relative_to(CONF).as_posix().removeprefix("."), path.stem]
        prefix = f"{file.package}." if file.package else ""
        shown = {option.key.removeprefix(prefix) for option in file.options if option.default}
        assert shown == set(leaves(OmegaConf.load(path))), path


def test_every_key_is_described(made):
    bare = [
        f"conf/{file.group}/{file.name}.yaml: {option.key}"
        for file in made.read_conf()
        for option in file.options
        if not option.described
    ]
    assert not bare, "describe these in a comment next to them or in the constructor's Args"


def test_the_page_shows_what_the_files_say(made):
    pages = importlib.import_module("pages")
    text = pages.options_page(made.read_conf())
    for file in made.read_conf():
        assert f"{pages.anchor(file.group, file.name)}" in text
        for option in file.options:
            assert f"`{option.key}" in text
    assert "| `groups.theta` | `0.2` | bound on AMAD, in fractions of pi" in text
    assert "| `groups.num_groups` | **required** | G, from 1" in text
    assert "<!-- every option -->" in (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_comments_are_read_wherever_they_stand(made, tmp_path):
    (tmp_path / "train.yaml").write_text(
        "# What it does,\n# in two lines.\n"
        "a: '#1'   # beside\n"
        "# above\n"
        "b: [1, 2]\n"
        "c:        # of both\n"
        "  d: 1    # first\n"
        "          # and on\n"
        "  e: {f: 2, g: 3}   # together\n"
        "h: 1\n"
    )
    (file,) = made.read_conf(tmp_path)
    assert file.about == "What it does, in two lines."
    assert [(o.key, o.default, o.comment) for o in file.options] == [
        ("a", "'#1'", "beside"),
        ("b", "[1, 2]", "above"),
        ("c", "", "of both"),
        ("c.d", "1", "first and on"),
        ("c.e", "", "together"),
        ("c.e.f", "2", "together"),
        ("c.e.g", "3", "together"),
        ("h", "1", ""),
    ]


def test_arguments_are_those_of_the_docstrings(made):
    from groupsae.grouping.choices import ByAmad
    from groupsae.grouping.plan import GroupPlan

    docstrings = importlib.import_module("docstrings")
    for thing in (GroupPlan, ByAmad):
        said = docstrings.arguments(f"{thing.__module__}.{thing.__name__}", ROOT)
        for name, text in said.items():
            flat = " ".join((thing.__doc__ or "").split())
            assert f"{name}: {text}" in flat or text.startswith('"own" (its own SAE)')
    assert set(docstrings.arguments("groupsae.grouping.choices.ByAmad", ROOT)) == {
        "theta",
        "rule",
        "last_layer",  # explained by the base class
    }


def test_the_reference_has_every_public_module(made):
    pages = importlib.import_module("pages").api_pages(ROOT / "groupsae")
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "groupsae").rglob("*.py")
        if not path.name.startswith("_")
    }
    assert len(shown) == len(set(shown))
    assert set(shown) == modules


# ---- what the pages name ----------------------------------------------------------------------


def commands(text: str) -> set[tuple[str, str]]:
    """Return (command, arguments) of everything of ours that a page tells the reader to type."""
    typed = set(re.findall(r"-m groupsae\.(\w+)\b([^`\n]*)", text))
    return typed | set(re.findall(r'make (\w+) ARGS="([^"\n]*)"', text))


def points(arguments: list[str]) -> Iterator[list[str]]:
    """Yield the overrides of a sweep's first point and of the last on each of its axes."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    first = [axis[0] for axis in axes]
    yield first
    for at, axis in enumerate(axes):
        if len(axis) > 1:
            yield [*first[:at], axis[-1], *first[at + 1 :]]


def check(command: str, typed: str, own_conf: Path) -> None:
    """Compose what a command would run with."""
    typed = re.sub(r"<[^<>\n]*>", "placeholder", typed)
    typed = re.sub(r"\$\w+", "1", typed)
    arguments = [a for a in shlex.split(typed, comments=True) if a != "..."]
    sweep = "-m" in arguments
    if "--config-dir" in arguments:
        at = arguments.index("--config-dir")
        arguments[at : at + 2] = [f"hydra.searchpath=[file://{own_conf}]"]
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    assert set(arguments) - set(overrides) <= {"-m", "--cfg", "job"}, arguments
    if command == "report":  # which takes several folders with commas between
        overrides = [re.sub(r"^run=(.*)$", r"run=[\1]", each) for each in overrides]
    overrides = with_parts(overrides)
    for point in points(overrides) if sweep else [overrides]:
        compose_once(command, tuple(point))


@cache  # pages repeat each other's commands
def compose_once(command: str, point: tuple[str, ...]) -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose(command, overrides=list(point))
    if command == "train":
        assert OmegaConf.missing_keys(cfg) == set(), point


@page
def test_every_command_composes(path, tmp_path):
    register_resolver()
    text = path.read_text(encoding="utf-8")
    (tmp_path / "experiment").mkdir()
    for block in re.findall(r"```yaml\n(# @package _global_.*?)```", text, re.DOTALL):
        (tmp_path / "experiment" / "gpt2.yaml").write_text(block)
    for command, typed in sorted(commands(text)):
        assert (CONF / f"{command}.yaml").exists(), f"{named(path)} names groupsae.{command}"
        check(command, typed, tmp_path)


def test_commands_are_found_and_wrong_ones_are_reported(tmp_path):
    found = commands('`python -m groupsae.train seed=1`\n    make train ARGS="a=b"  # now\n')
    assert found == {("train", " seed=1"), ("train", "a=b")}
    sweep = points(["seed=0,1", "tokens=7"])
    assert list(sweep) == [["seed=0", "tokens=7"], ["seed=1", "tokens=7"]]
    for wrong in ("groups=amd", "-m groups=amad,amd", "stream.contxt=1", "groups=count"):
        with pytest.raises(Exception, match=r"amd|contxt|num_groups"):
            check("train", wrong, tmp_path)


@page
def test_every_make_target_exists(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    )make (\w+)", path.read_text(encoding="utf-8"), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


@page
def test_only_options_that_exist_are_named(path):
    text = path.read_text(encoding="utf-8")
    for group, option in re.findall(rf"\b({'|'.join(GROUPS)})=([\w.-]+)", text):
        exists = (CONF / group / f"{option}.yaml").exists()
        assert exists or (group, option) in OWN, f"{group}={option}"


@page
def test_only_keys_that_exist_are_named(path, made):
    keys = {option.key for file in made.read_conf() for option in file.options}
    holders = {key.rpartition(".")[0] for key in keys}
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    tops = {key.partition(".")[0] for key in keys if "." in key}
    for key in re.findall(rf"`((?:{'|'.join(sorted(tops))})\.[a-z0-9_.]+)", text):
        assert key in keys | holders or re.search(FILE, key), f"{named(path)} names {key}"


@page
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)|src=\"([^\"]+)\"", path.read_text("utf-8")):
        target = "".join(link).partition("#")[0]
        assert (path.parent / target).exists(), f"{named(path)} links to {target}"


@page
def test_examples_in_python_use_what_exists(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("groupsae"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{named(path)}: {alias.name}"
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "groupsae":
                assert hasattr(importlib.import_module("groupsae"), node.attr), node.attr


# ---- the site, where its packages are installed (make docs) -----------------------------------


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    for package in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    settings = DOCS / "mkdocs" / "mkdocs.yml"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(settings)]
    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {file.relative_to(tmp_path).as_posix(): file for file in tmp_path.rglob("*.html")}
    for name, file in pages.items():
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", file.read_text("utf-8"))
        assert not [tag for tag in tags if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)], name
    concepts = pages["concepts.html"].read_text("utf-8")
    assert concepts.count("<math") > 20
    assert "arithmatex" not in concepts
    assert 'id="conf-groups-amad"' in pages["configuration.html"].read_text("utf-8")
    assert "configuration.html#conf-experiment-replication" in (
        pages["replication.html"].read_text("utf-8")
    )


@page
def test_marked_places_hold_the_figures_of_their_command(path, made):
    text = path.read_text(encoding="utf-8")
    for command, figures in re.findall(
        r"<!-- figures: (.*?) -->(.*?)<!-- end of figures -->", text, flags=re.DOTALL
    ):
        assert figures.count("\n|") >= 3, f"{named(path)}: {command} has not been run"
    assert text.count("<!-- figures: ") == text.count("<!-- end of figures -->")
