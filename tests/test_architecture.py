"""How the package is built: light imports, one place that reads configurations.

Which room may import which is held by the contracts in pyproject.toml (`lint-imports`, a part of
`make check`); here is what they cannot see.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import groupsae
from tests.conftest import CHECKED

PACKAGE = Path(groupsae.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
KNOW_HYDRA = {"app", "config"}  # rooms; besides the commands, at the top of the package


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(done.stdout.split())


def imported(file: Path) -> set[str]:
    """Return the top-level modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def test_importing_the_package_is_light():
    heavy = {"torch", "lightning", "transformers", "datasets", "hydra", "numpy", "wandb"}
    assert not loaded_by("import groupsae") & heavy


def test_the_partition_core_needs_neither_torch_nor_lightning_nor_hydra():
    loaded = loaded_by("from groupsae.grouping import amad, choose, partition")
    assert not loaded & {"torch", "lightning", "transformers", "hydra", "wandb", "matplotlib"}


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "import_saes", "report"])
def test_the_command_answers_before_it_loads_torch(command):
    """A wrong option is reported at once: slow imports come after the cheap checks."""
    heavy = {"torch", "lightning", "transformers", "matplotlib"}
    assert not loaded_by(f"import groupsae.{command}") & heavy


@pytest.mark.parametrize("text", ["data=files data.path=none", "data=hf data.name=./none"])
def test_a_text_that_does_not_exist_is_reported_before_torch_is_loaded(text):
    loaded = loaded_by(f"""
from groupsae.app.run_folder import open_run
from groupsae.runtime.errors import UserError
from tests.helpers.runs import composed
overrides = {text.split()}
try:
    open_run(composed(overrides), overrides).__enter__()
except UserError as error:
    assert "none" in str(error), error
else:
    raise AssertionError""")
    assert not loaded & {"torch", "lightning", "transformers"}


def test_saved_suites_load_without_lightning_and_transformers():
    loaded = loaded_by("from groupsae import load_suite")
    assert not loaded & {"lightning", "transformers", "datasets", "hydra", "wandb"}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_only_the_commands_app_and_config_know_hydra(file):
    if Path(relative(file)).parts[0] not in KNOW_HYDRA and file.parent != PACKAGE:
        assert not imported(file) & {"hydra", "omegaconf"}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_annotated_shapes_are_checked_in_the_tests(file):
    if "jaxtyping" in imported(file):
        assert Path(relative(file)).parts[0] in CHECKED


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_every_file_says_what_it_is_for(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_no_module_is_a_drawer():
    assert not {"utils.py", "helpers.py", "common.py", "misc.py"} & {file.name for file in FILES}


def test_the_public_names_are_there():
    for name in groupsae.__all__:
        assert hasattr(groupsae, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        groupsae.no_such_name  # noqa: B018
