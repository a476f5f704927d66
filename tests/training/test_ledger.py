"""The cost ledger of a run: FLOPs against a counter, seconds against a clock."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from groupsae.cost.model import Trained, Workload
from groupsae.grouping.groupings import groupings
from groupsae.grouping.plan import GroupPlan
from tests.helpers.runs import overrides, read_checkpoint, rewrite_checkpoint, run, stopped

ALL = ["groups=all", "groups.rules=[complete,even]", "groups.smaller=[1,2]"]
CONTEXT, TOKENS, CALIBRATION = 64, 3072, 1024


def ledger_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ledger.json").read_text())


def parts_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {part["part"]: part for part in ledger_of(folder)["parts"]}


def seconds_of(folder: Path) -> dict[str, float]:
    return {name: part["seconds"] for name, part in parts_of(folder).items()}


def widths_of(folder: Path) -> dict[str, int]:
    """Return the latents of every SAE."""
    files = folder.glob("saes/*/cfg.json")
    return {file.parent.name: json.loads(file.read_text())["d_sae"] for file in files}


@pytest.fixture(scope="module")
def clock() -> dict[Path, float]:
    """Return what the test's own clock says of the fits, by run folder."""
    return {}


@pytest.fixture(scope="module")
def start(
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    clock: dict[Path, float],
) -> Any:
    """Return a function that trains, timed from the first hook of the fit to the last."""
    from groupsae.training.callbacks.throughput import Throughput

    def train(*arguments: str) -> Path:
        marks: list[float] = []
        first, last = Throughput.on_fit_start, Throughput.on_fit_end

        def on_fit_start(self: Throughput, *args: Any) -> None:
            marks.append(time.perf_counter())
            first(self, *args)

        def on_fit_end(self: Throughput, *args: Any) -> None:
            last(self, *args)
            marks.append(time.perf_counter())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Throughput, "on_fit_start", on_fit_start)
            patch.setattr(Throughput, "on_fit_end", on_fit_end)
            status, folder = run(
                overrides(tiny_lm, tiny_text, tmp_path_factory.mktemp("out"), *arguments)
            )
        assert status == 0
        clock[folder] = marks[1] - marks[0]
        return folder

    return train


@pytest.fixture(scope="module")
def everything(start: Any) -> Path:
    return start(*ALL)


@pytest.fixture(scope="module")
def ordinary(start: Any) -> Path:
    return start("groups=even", "groups.num_groups=2")


def test_planned_flops_are_what_a_counter_sees_of_a_run(everything: Path) -> None:
    parts = parts_of(everything)
    for name in ("activations", "saes"):
        assert parts[name]["planned_flops"] == parts[name]["measured_flops"] > 0
    adding = 2 * CALIBRATION * math.comb(4, 2)  # the sums over tokens, which no model counts
    distances = parts["distances"]
    assert distances["measured_flops"] == distances["planned_flops"] + adding


@pytest.mark.parametrize(
    "arguments",
    [
        ["groups=even", "groups.num_groups=2", "groups.last_layer=skip"],
        ["groups=per_layer", "sae.k=1", "sae.auxk_alpha=0"],
        ["groups=all", "groups.last_layer=group", "stream.context=32"],
        [
            "groups=even",
            "groups.num_groups=1",
            "stream.layers_per_token=3",
            "sae.layer_bias=per_layer",
            "sae.layer_rank=2",
        ],
    ],
)
def test_planned_flops_are_the_counted_ones_of_other_runs_too(
    start: Any, arguments: list[str]
) -> None:
    parts = parts_of(start("tokens=512", *arguments))
    for name in ("activations", "saes"):
        assert parts[name]["planned_flops"] == parts[name]["measured_flops"] > 0


def test_planned_flops_are_those_of_the_cost_model(everything: Path) -> None:
    ledger, parts = ledger_of(everything), parts_of(everything)
    work = Workload.from_json(ledger["workload"])
    assert (work.tokens, work.calibration_tokens) == (TOKENS, CALIBRATION)
    assert (work.num_layers, work.layers_run) == (4, 4)
    assert (work.d_model, work.context) == (32, CONTEXT)
    widths = widths_of(everything)
    assert ledger["num_saes"] == len(widths)
    assert ledger["tokens"] == TOKENS
    assert parts["activations"]["planned_flops"] == TOKENS * (
        24 * 4 * 32**2 + 4 * 4 * CONTEXT * 32
    )
    assert parts["saes"]["planned_flops"] == TOKENS * sum(
        2 * 32 * n + 8 * 32 * 4 for n in widths.values()
    )
    assert parts["distances"]["planned_flops"] == work.calibration + work.distances


def test_seconds_are_positive_and_add_up_to_the_clock(
    everything: Path, clock: dict[Path, float]
) -> None:
    seconds = seconds_of(everything)
    assert list(seconds) == ["activations", "distances", "saes", "validation", "other"]
    assert all(value > 0 for value in seconds.values())
    fitting = sum(seconds.values()) - seconds["distances"]  # which comes before the fit
    assert fitting <= clock[everything]
    assert fitting == pytest.approx(clock[everything], rel=0.02, abs=0.02)


def test_the_saving_in_seconds_follows_from_the_parts(everything: Path, ordinary: Path) -> None:
    for folder in (everything, ordinary):
        ledger, seconds = ledger_of(folder), seconds_of(folder)
        work = Workload.from_json(ledger["workload"])
        plan = GroupPlan.from_json(json.loads((folder / "groups.json").read_text())["plan"])
        each = ledger["seconds_per_sae"]
        total = sum(each[str(d_sae)] for d_sae in widths_of(folder).values())
        assert total == pytest.approx(seconds["saes"])
        shared = seconds["activations"] + seconds["distances"]
        groups = shared + each["64"] * len(plan.saes)
        per_layer = shared + each["64"] * 4
        assert ledger["per_layer"]["seconds"] == pytest.approx(per_layer)
        assert ledger["saving"]["seconds"] == pytest.approx(1 - groups / per_layer)
        single = [Trained(64, 1)] * 4
        assert ledger["per_layer"]["planned_flops"] == work.total(single, distances=False)
        measured = folder == everything  # evenly spaced groups need no distances
        trained = [Trained(64, len(layers)) for layers in plan.saes]
        total = work.total(trained, distances=measured)
        assert ledger["saving"]["flops"] == pytest.approx(
            1 - total / ledger["per_layer"]["planned_flops"]
        )
        summary = json.loads((folder / "summary.json").read_text())["cost"]
        assert ledger["saving"]["paper"] == summary["paper_saving"]
        assert ledger["saving"]["paper_both_sides"] == summary["paper_saving_both_sides"]


def test_groups_of_a_run_of_their_own_take_the_seconds_that_were_measured(ordinary: Path) -> None:
    """There the SAEs are the groups' only: what they cost is no estimate."""
    ledger, seconds = ledger_of(ordinary), seconds_of(ordinary)
    groups = seconds["activations"] + seconds["distances"] + seconds["saes"]
    assert ledger["saving"]["seconds"] == pytest.approx(
        1 - groups / ledger["per_layer"]["seconds"]
    )


def test_sharing_is_counted_against_one_run_for_each_grouping(everything: Path) -> None:
    ledger, seconds, widths = ledger_of(everything), seconds_of(everything), widths_of(everything)
    sharing = ledger["sharing"]
    plan = GroupPlan.from_json(json.loads((everything / "groups.json").read_text())["plan"])
    found = groupings(plan)
    assert sharing["groupings"] == len(found) >= 5
    separately = 0.0
    for each in found:
        separately += seconds["activations"]
        for name in set(each.sae_of_layer.values()):
            separately += ledger["seconds_per_sae"][str(widths[name])]
    together = seconds["activations"] + seconds["saes"] + seconds["other"]
    assert sharing["seconds_separately"] == pytest.approx(separately)
    assert sharing["seconds"] == pytest.approx(together)
    assert sharing["factor"] == pytest.approx(separately / together)
    assert sharing["bound_seconds"] == pytest.approx(2 * seconds["activations"] + seconds["saes"])


def test_every_width_has_seconds_of_its_own(everything: Path, ordinary: Path) -> None:
    each = ledger_of(everything)["seconds_per_sae"]
    assert {int(d_sae) for d_sae in each} == set(widths_of(everything).values())
    assert len(each) == 3  # full, and two sizes of smaller SAEs
    assert all(seconds > 0 for seconds in each.values())
    assert list(ledger_of(ordinary)["seconds_per_sae"]) == ["64"]


def test_an_ordinary_run_shares_nothing(ordinary: Path) -> None:
    assert ledger_of(ordinary)["sharing"] is None


def test_the_ledger_names_the_place_of_the_measurement(ordinary: Path) -> None:
    ledger = ledger_of(ordinary)
    assert ledger["device"] == "cpu"
    assert ledger["threads"] == torch.get_num_threads()


def test_a_resumed_run_keeps_its_seconds(tiny_lm: Path, tiny_text: Path, tmp_path: Path) -> None:
    status, folder = stopped(overrides(tiny_lm, tiny_text, tmp_path, *ALL))
    assert status == 128 + signal.SIGTERM
    assert not (folder / "ledger.json").exists()

    file = folder / "checkpoints" / "step=3.ckpt"
    checkpoint = read_checkpoint(file)
    stream, watches = checkpoint["ActivationDataModule"], checkpoint["callbacks"]["Throughput"]
    for stored in (stream["seconds"], watches["saes"], watches["all"]):
        assert stored > 0
    assert stream["seconds"] + watches["saes"] + watches["validation"] < watches["all"]
    # as if the first three steps had taken hours
    stream["seconds"], watches["saes"], watches["validation"] = 1000.0, 5000.0, 200.0
    watches["all"] = 7000.0
    rewrite_checkpoint(file, checkpoint)
    status, _ = run([f"resume={folder}"])
    assert status == 0
    seconds = seconds_of(folder)
    for name, before in (
        ("activations", 1000),
        ("saes", 5000),
        ("validation", 200),
        ("other", 800),
    ):
        assert before < seconds[name] < before + 60, name
    assert parts_of(folder)["saes"]["measured_flops"] == parts_of(folder)["saes"]["planned_flops"]
    assert 0 < seconds["distances"] < 60  # measured before the stop, kept with the distances
