"""Runs of groups=all: every grouping from one stream, each SAE as if trained alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from groupsae.grouping.plan import GroupPlan
from groupsae.runtime.errors import UserError
from tests.helpers.runs import overrides, run, saved, stopped


def test_the_command_answers_values_of_another_kind_with_a_sentence() -> None:
    """Without the tests' own checks of types, which would come first."""
    bad = {
        "groups.rules=3": "groups.rules is 3",
        "groups.rules=null": "groups.rules is None",
        "groups.rules=[[complete]]": "rule is ['complete']: use",
        "groups.smaller=2": "groups.smaller is 2",
        "groups.smaller=null": "groups.smaller is None",
        "groups.smaller=[a]": "groups.smaller holds 'a'",
        "groups.theta=low": "theta is 'low'",
    }
    code = f"""
from tests.helpers import runs
from groupsae.runtime.errors import UserError
from groupsae.app.run_folder import run_folder
for argument, sentence in {bad}.items():
    try:
        run_folder(runs.composed(["groups=all", argument]))
    except UserError as error:
        assert sentence in str(error), str(error)
    else:
        assert False, argument
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- complete runs --------------------------------------------------------------------------

EVERYTHING = ["groups=all", "groups.rules=[complete,minmax,even]", "groups.smaller=[1,2]"]


@pytest.fixture(scope="module")
def together(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that trained all groupings from one stream."""
    status, folder = run(
        overrides(tiny_lm, tiny_text, tmp_path_factory.mktemp("all"), *EVERYTHING)
    )
    assert status == 0
    return folder


def plan_of(folder: Path) -> GroupPlan:
    return GroupPlan.from_json(json.loads((folder / "groups.json").read_text())["plan"])


def assert_same_saes(folder: Path, alone: Path, rename: str = "") -> set[str]:
    """Compare all SAEs of a run trained alone, bit for bit; return their names."""
    import torch

    ours, theirs = saved(folder), saved(alone)
    assert theirs
    names = set()
    for key, tensor in theirs.items():
        name, part = key.split("/")
        mine = f"{name}{rename}"
        if rename and f"{mine}/{part}" not in ours:
            continue  # the last layer has no smaller SAE
        assert torch.equal(ours[f"{mine}/{part}"], tensor), key
        names.add(mine)
        configs = [
            json.loads((f / "saes" / n / "cfg.json").read_text())
            for f, n in ((folder, mine), (alone, name))
        ]
        for key in ("d_sae", "layers", "norm_factors", "tokens", "architecture", "text"):
            assert configs[0][key] == configs[1][key], key
    return names


def test_every_sae_of_all_groupings_equals_the_one_trained_alone_bit_for_bit(
    together: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Each distinct group once, whatever trains with it; smaller SAEs are scaled ones."""
    plan = plan_of(together)
    merged = {str(p.groups): p.groups for p in plan.partitions if p.num_groups < p.num_layers}
    assert len(merged) >= 2
    runs = [
        ["groups=explicit", f"groups.groups={text.replace(' ', '')}"] for text in sorted(merged)
    ]
    compared = set()
    for arguments in [["groups=per_layer"], *runs]:
        status, alone = run(overrides(tiny_lm, tiny_text, tmp_path, *arguments))
        assert status == 0
        compared |= assert_same_saes(together, alone)
    for count in plan.smaller:
        scaled = f"sae.expansion={2 * (count / plan.partition.num_layers)!r}"
        arguments = overrides(tiny_lm, tiny_text, tmp_path, "groups=per_layer", scaled)
        status, alone = run(arguments)
        assert status == 0
        compared |= assert_same_saes(together, alone, f".smaller-{count}")
    assert compared == {member.name for member in plan.members}


def test_aux_losses_were_part_of_what_was_compared(together: Path) -> None:
    summary = json.loads((together / "summary.json").read_text())
    assert any(group["dead"] > 0 for group in summary["groups"].values())
    assert summary["groups"].keys() == {member.name for member in plan_of(together).members}


def test_the_summary_of_all_groupings_is_that_of_the_chosen_one(
    together: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    status, alone = run(overrides(tiny_lm, tiny_text, tmp_path, "groups=amad"))
    assert status == 0
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (together, alone))
    for key in ("fvu", "num_groups", "amad", "tokens", "steps", "cost"):
        assert ours[key] == theirs[key], key
    for name, group in theirs["groups"].items():
        assert ours["groups"][name] == group


def test_a_resumed_run_of_all_groupings_is_the_same_bit_for_bit(
    together: Path,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    status, folder = stopped(overrides(tiny_lm, tiny_text, tmp_path, *EVERYTHING))
    assert status == 128 + signal.SIGTERM
    status, again = run([f"resume={folder}"])
    assert (status, again) == (0, folder)
    assert plan_of(folder) == plan_of(together)
    assert assert_same_saes(together, folder) == {m.name for m in plan_of(folder).members}


def test_rows_of_several_layers_of_each_token(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed bit for bit; tokens stay those of the language model, and rows are counted too."""
    one, two = (
        overrides(tiny_lm, tiny_text, tmp_path / name, *EVERYTHING, "stream.layers_per_token=2")
        for name in ("one", "two")
    )
    undisturbed = run(one)[1]
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped(two)[0] == 128 + signal.SIGTERM
    resumed = run(two)[1]
    assert_same_saes(undisturbed, resumed)
    summary = json.loads((resumed / "summary.json").read_text())
    assert (summary["tokens"], summary["steps"], summary["layers_per_token"]) == (3072, 6, 2)
    assert "3,072 tokens per SAE (rows of up to 2 layers from each) at" in printed
    for group in summary["groups"].values():
        assert group["rows"] == sum(group["tokens_per_layer"].values())
        assert group["rows"] == 3072 * min(2, len(group["layers"]))
    for file in resumed.glob("saes/*/cfg.json"):
        config = json.loads(file.read_text())
        assert (config["tokens"], config["rows"]) == (3072, 3072 * min(2, len(config["layers"])))


def test_a_run_of_all_groupings_loads_as_any_of_them(together: Path) -> None:
    import groupsae
    from groupsae.grouping.groupings import groupings

    found = groupings(plan_of(together))
    default = groupsae.load_suite(together)
    assert {x: default.group_of(x) for x in default.layers} == found[0].sae_of_layer
    for each in found:
        suite = groupsae.load_suite(together, grouping=each.name)
        assert {x: suite.group_of(x) for x in suite.layers} == each.sae_of_layer
    with pytest.raises(UserError, match=f"no grouping 'complete-9' in .*{found[-1].name}"):
        groupsae.load_suite(together, grouping="complete-9")
