"""Paths and names on the command line are texts, whatever they look like."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from omegaconf import OmegaConf

import groupsae
from groupsae.config.arguments import composed, read
from groupsae.config.security import check_own
from groupsae.config.values import evaluation_parts
from groupsae.runtime.commands import argument, command
from groupsae.runtime.errors import UserError

ODD = [
    "stop me (1)", "a=b,c", "exp[v2]", "[old]/x", "2024", "1.0", "83e20101", "true", "null",
    "None", "it's", 'say "hi"', '"quoted"', "'single'", "back\\slash", "end\\", " blank ", "ünï",
    "{a}", "$HOME", "${x}", "#1", "choice(a,b)", "~tilde", "a;b&c|d", "*.txt", "a:b", "x y",
]  # fmt: skip


def values_of(*arguments: str, name: str = "train") -> list[object]:
    """Return the values that Hydra reads; of a sweep the list."""
    given = [each for each in read(list(arguments), name) if each != "-m"]
    parsed = OverridesParser.create().parse_overrides(given)
    values = [override.value() for override in parsed]
    return [
        [getattr(v, "text", v) for v in value.list] if isinstance(value, Sweep) else value
        for value in values
    ]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("of", "key"), [("evaluate", "run"), ("train", "resume")])
def test_a_printed_command_names_the_folder_that_it_was_made_for(
    of: str, key: str, name: str
) -> None:
    """Through a shell's quoting, ours and Hydra's; interpolations are escaped for OmegaConf."""
    pasted = shlex.split(command(of, **{key: name}))
    assert pasted[:3] == ["python", "-m", f"groupsae.{of}"]
    (value,) = values_of(*pasted[3:], name=of)
    assert OmegaConf.create({"value": value}).value == name
    assert shlex.split(argument(key, name)) == pasted[3:]


def test_every_command_with_a_value_is_made_in_one_place() -> None:
    """The others are examples such as `run=<run folder>`."""
    by_hand = re.compile(r"python -m groupsae\.\w+[^\n]*\{|quote\(f")
    files = Path(groupsae.__file__).parent.rglob("*.py")
    found = {file.name: by_hand.findall(file.read_text(encoding="utf-8")) for file in files}
    assert [name for name, lines in found.items() if lines] == ["commands.py"]


@pytest.mark.parametrize(
    "argument",
    [
        "data.path=2024", "model.name=143000", "output=2024", "model.revision=83e20101",
        "model.revision=1.0", "data.name=true", "data.column=Null", "data.split=train[:10]",
        "output=exp[v2]", "data.path=stop me (1)", "+model.load.subfolder=7", "data.path=[old]",
        "logger.wandb.project=2024", "data.path=a=b", "data.path=ö",
    ],
)  # fmt: skip
def test_names_are_texts(argument: str) -> None:
    assert values_of(argument) == [argument.partition("=")[2]]
    assert values_of("-m", argument) == values_of(argument)


def test_what_is_no_name_keeps_its_meaning() -> None:
    given = [
        "tokens=1000",
        "model.revision=null",
        "sae.k=1,2",
        "groups.rules=[even]",
        "~callbacks",
    ]
    assert read(given, "train") == given
    assert values_of("output='my runs'", "data.column=text") == ["my runs", "text"]
    assert values_of("output=${oc.env:SCRATCH}/a (1)") == ["${oc.env:SCRATCH}/a (1)"]
    functions = ["-m", "model.revision=choice(step1,step2)"]
    assert read(functions, "train") == functions
    # without -m commas are for Hydra to explain
    assert read(["model.revision=1,2"], "train") == ["model.revision=1,2"]


def test_values_of_a_sweep_are_texts_one_by_one() -> None:
    assert values_of("-m", "model.revision=step1000,143000,1e3,'a,b'") == [
        ["step1000", "143000", "1e3", "a,b"]
    ]  # fmt: skip


def test_a_folder_with_a_comma_in_its_name_is_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert values_of("run=a,2", name="report") == [["a", "2"]]
    (tmp_path / "a,2").mkdir()
    assert values_of("run=a,2", name="report") == ["a,2"]
    assert values_of("-m", "data.path=a,2") == ["a,2"]


@pytest.mark.parametrize("given", ["~/runs", "'~/runs'", '"~/runs"'])
def test_the_home_folder_is_written_out(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    in_train, in_others = ("output", "data.cache", "resume"), ("run", "saes", "output")
    for key in in_train:
        assert values_of(f"{key}={given}") == [str(tmp_path / "runs")]
    for key in in_others:
        assert values_of(f"{key}={given}", name="export") == [str(tmp_path / "runs")]
    assert values_of("run=~/a,~/b", name="report") == [[f"{tmp_path}/a", f"{tmp_path}/b"]]
    cfg = OmegaConf.create({"output": "~/runs", "model": {"name": "~"}})  # of a yaml file
    check_own(cfg)
    assert cfg == {"output": f"{tmp_path}/runs", "model": {"name": os.path.expanduser("~")}}


@pytest.mark.parametrize("value", [1.0, 143000, True, float("inf")])
def test_a_number_for_a_name_in_a_yaml_file_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"model\.revision is .* quotes in your yaml file"):
        check_own(OmegaConf.create({"model": {"revision": value}}))


def test_an_evaluation_has_the_parts_that_are_chosen_in_any_order() -> None:
    def parts(*arguments: str) -> dict[str, Any]:
        return evaluation_parts(composed(arguments, "train").evaluation)

    assert list(parts()) == ["heldout"]
    listed = parts("evaluation=circuits", "evaluation.circuits.tasks=[quote,a b.jsonl]")
    assert listed["circuits"]["tasks"] == ["quote", "a b.jsonl"]
    both = parts(
        "evaluation=[circuits,heldout]", "evaluation.tokens=5", "evaluation.circuits.steps=3"
    )
    assert list(both) == ["heldout", "circuits"]
    assert (both["heldout"]["tokens"], both["circuits"]["steps"]) == (5, 3)
    assert list(parts("evaluation=circuits-paper")) == ["circuits"]
    for part in ("circuits", "harness"):
        short = parts(f"evaluation=[heldout,{part}]", "tasks=[code,a b.jsonl]")
        assert short[part]["tasks"] == ["code", "a b.jsonl"]
        assert parts(f"evaluation={part}", "tasks=ioi")[part]["tasks"] == ["ioi"]
    paper = parts("evaluation=circuits-paper", "tasks=[ioi]")
    assert paper["circuits"]["tasks"] == ["ioi"]
    own = "evaluation=[mycircuits,heldout]"  # the user's, of which no tasks are known
    for unclear in ("evaluation=[circuits,harness]", "evaluation=probes", own):
        with pytest.raises(UserError, match="tasks= is for evaluation=circuits or"):
            parts(unclear, "tasks=[code]")
