"""Several processes give what one gives: every SAE in all of them, or each in one."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groupsae.grouping.plan import GroupPlan
from groupsae.runtime.errors import UserError
from groupsae.training.group import JointStep
from tests.helpers.fits import make_optim
from tests.helpers.processes import Ended, lose, stop, together, train
from tests.helpers.runs import overrides, read_checkpoint, run, saved, stopped

# a forward of two blocks: in one process as in three, so that the same products are computed
SIZES = ["stream.blocks_per_step=12", "stream.blocks_per_forward=2", "tokens=4608"]
CPUS = ["trainer.accelerator=cpu"]
# what is different about a batch: rows left out by norm, an SAE that looks at all rows at once
HARD = [
    "groups=count", "groups.num_groups=1", "sae=batchtopk", "stream.max_norm_ratio=1.5",
    "stream.skip_positions=1", "b_dec_start=geometric_median", "stream.layers_per_token=2",
    "sae.layer_bias=per_layer", "sae.layer_rank=2",
]  # fmt: skip
ALL = ["groups=all", "groups.rules=[complete,even]", "groups.smaller=[1,2]"]


@pytest.fixture(scope="module")
def arguments(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(*more: str) -> list[str]:
        return overrides(tiny_lm, tiny_text, tmp_path_factory.mktemp("out"), *SIZES, *more)

    return make


@pytest.fixture(scope="module")
def alone(arguments: Any) -> Path:
    """Return the folder of a run of one process."""
    status, folder = run(arguments())
    assert status == 0
    return folder


def folder_of(arguments: list[str]) -> Path:
    (output,) = (a.partition("=")[2] for a in arguments if a.startswith("output="))
    (groups,) = Path(output).rglob("groups.json")
    return groups.parent


def spread(given: list[str], processes: int, log: Path, job: Any = train, *more: Any) -> Any:
    """Run a job in processes that share the SAEs out; return its folder and how each ended."""
    command = [*given, "trainer=sae_parallel", *CPUS, f"trainer.devices={processes}"]
    ended = together(job, processes, log, command, *more)
    return folder_of(given), ended


def fine(ended: list[Ended]) -> None:
    assert [each.status for each in ended] == [0] * len(ended), "\n".join(e.output for e in ended)


def metrics_of(folder: Path) -> dict[tuple[str, str], float]:
    with (folder / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return {
        (row["step"], row["metric"]): float(row["value"])
        for row in rows
        if not row["metric"].startswith("time/")
    }


def compare(one: Path, several: Path, **tolerance: float) -> None:
    """Compare two finished runs: bit for bit where `tolerance` is zero."""
    plans = [json.loads((f / "groups.json").read_text()) for f in (one, several)]
    assert plans[0]["saes"] == plans[1]["saes"]
    angles = [dict(np.load(f / "angles.npz")) for f in (one, several)]
    assert angles[0].keys() == angles[1].keys()
    for name in angles[0].keys() - {"provenance", "seconds"}:
        # sums of float64 in another order, whatever follows
        np.testing.assert_allclose(angles[1][name], angles[0][name], rtol=1e-7, atol=1e-9)
    checkpoints = [read_checkpoint(f / "checkpoints" / "step=6.ckpt") for f in (one, several)]
    states = [c["state_dict"] for c in checkpoints]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        exact = {"rtol": 0, "atol": 0}
        close = tolerance if tensor.is_floating_point() else exact  # counters: always the same
        torch.testing.assert_close(states[1][name], tensor, equal_nan=True, **close)
    moments = [c["optimizer_states"][0]["state"] for c in checkpoints]
    assert moments[0].keys() == moments[1].keys()
    ours, theirs = saved(one), saved(several)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, **tolerance)
    figures = [metrics_of(f) for f in (one, several)]
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[0].items():
        # validation adds the same rows up in another order
        bound = max(tolerance["rtol"], 1e-6)
        assert figures[1][name] == pytest.approx(value, rel=bound, abs=bound), name
    summaries = [json.loads((f / "summary.json").read_text()) for f in (one, several)]
    for name, group in summaries[0]["groups"].items():
        assert group["tokens_per_layer"] == summaries[1]["groups"][name]["tokens_per_layer"]
        assert group["dead"] == summaries[1]["groups"][name]["dead"]
    assert summaries[0].keys() == summaries[1].keys()
    costs = [json.loads((f / "ledger.json").read_text()) for f in (one, several)]
    for ours, theirs in zip(costs[0]["parts"], costs[1]["parts"], strict=True):
        assert ours["planned_flops"] == theirs["planned_flops"]
        if ours["measured_flops"] is not None:
            assert theirs["measured_flops"] == pytest.approx(ours["measured_flops"], rel=0.05)
    assert costs[0]["seconds_per_sae"].keys() == costs[1]["seconds_per_sae"].keys()


def test_spread_over_two_processes_it_is_the_same_bit_for_bit(
    arguments: Any, alone: Path, tmp_path: Path
) -> None:
    """Every owner does what one process does, with the same rows in the same order."""
    folder, ended = spread(arguments(), 2, tmp_path)
    fine(ended)
    compare(alone, folder, rtol=0, atol=0)
    printed = " ".join(ended[0].output.split())
    assert "process 0: layers.0, layers.3; 0.00 GB for them" in printed
    # 384 tokens of process 1 in 2 slots of 32 float32 each come to process 0
    assert "0.1 MB received in a step process 1: layers.1-2;" in printed


@pytest.mark.slow
def test_spread_over_three_one_of_which_owns_nothing(arguments: Any, tmp_path: Path) -> None:
    status, one = run(arguments(*HARD))
    assert status == 0
    folder, ended = spread(arguments(*HARD), 3, tmp_path)
    fine(ended)
    compare(one, folder, rtol=0, atol=0)
    assert "process 2: no SAE, only the language model" in ended[0].output


def test_all_groupings_spread_over_two(arguments: Any, tmp_path: Path) -> None:
    """SAEs of several widths, with slots that both processes need."""
    status, one = run(arguments(*ALL))
    assert status == 0
    folder, ended = spread(arguments(*ALL), 2, tmp_path)
    fine(ended)
    compare(one, folder, rtol=0, atol=0)
    plan = GroupPlan.from_json(json.loads((folder / "groups.json").read_text())["plan"])
    assert len(saved(folder)) == 4 * len(plan.members) == 52


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_stopped_run_resumes_with_another_number_of_processes(
    arguments: Any, alone: Path, tmp_path: Path, before: int, after: int
) -> None:
    given = arguments()
    if before == 1:
        status, folder = stopped(given)
        assert status == 128 + signal.SIGTERM
        ended = together(
            train, after, tmp_path,
            [f"resume={folder}", "trainer=sae_parallel", *CPUS, f"trainer.devices={after}"],
        )  # fmt: skip
        fine(ended)
    else:
        folder, ended = spread(given, before, tmp_path, stop)
        assert [each.status for each in ended] == [128 + signal.SIGTERM] * before
        assert run([f"resume={folder}", "trainer=cpu"])[0] == 0
    assert not list(folder.rglob("*.partial"))
    ours, theirs = saved(alone), saved(folder)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("rows", [1, 2])
def test_sharing_every_sae_out_gives_what_one_process_gives(
    arguments: Any, alone: Path, tmp_path: Path, rows: int
) -> None:
    """DDP: float32 sums in another order, through six Adam steps of up to 1e-3 * 16 each."""
    given = arguments(f"stream.layers_per_token={rows}")
    if rows > 1:
        alone = run(arguments(f"stream.layers_per_token={rows}"))[1]
    ended = together(train, 2, tmp_path, [*given, "trainer=ddp", *CPUS, "trainer.devices=2"])
    fine(ended)
    compare(alone, folder_of(given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "sae_parallel"])
def test_the_others_stop_with_a_sentence_when_a_process_is_lost(
    arguments: Any, tmp_path: Path, mode: str
) -> None:
    given = arguments()
    command = [*given, f"trainer={mode}", *CPUS, "trainer.devices=2"]
    lost, left = together(lose, 2, tmp_path, command, 0, 0.0)
    assert lost.status == -signal.SIGKILL
    assert left.status == 2, left.output
    assert "error: another process of this run was lost" in left.output
    assert f"resume={folder_of(given)}" in left.output
    assert (folder_of(given) / "checkpoints" / "step=3.ckpt" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "sae_parallel"])
def test_a_process_that_stalls_is_given_up(arguments: Any, tmp_path: Path, mode: str) -> None:
    command = [
        *arguments(), f"trainer={mode}", *CPUS, "trainer.devices=2",
        "trainer.strategy.timeout_minutes=0.4",
    ]  # fmt: skip
    stalled, left = together(lose, 2, tmp_path, command, 1, 60.0)[::-1]
    assert left.status == 2, left.output
    assert "did not answer in time" in left.output
    assert stalled.status in (2, -signal.SIGKILL)


def test_sums_are_made_on_the_device_wherever_the_suite_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL sums nothing on the host, where Lightning brings the suite after the last step."""
    seen = []

    def all_reduce(value: torch.Tensor) -> None:
        seen.append(value.device.type)
        raise NotImplementedError

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    joint = JointStep([], make_optim(), "stop", sharing=2, device=torch.device("meta"))
    with pytest.raises(NotImplementedError):
        joint.all_sum(torch.ones(3))
    assert seen == ["meta"]


def test_another_number_of_processes_than_was_started_is_a_sentence(
    arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"devices=4.*trainer\.devices"):
        run(arguments("trainer=ddp", *CPUS, "trainer.devices=4"))
