"""Complete runs on a GPU: one process over NCCL, the language model in bfloat16, the forecast."""

import json
from pathlib import Path

import pytest
import torch

from groupsae.training.group import JointStep
from tests.helpers.dry_runs import count, rows_of
from tests.helpers.fits import make_optim
from tests.helpers.runs import overrides, run, saved

pytestmark = pytest.mark.gpu

GPU = ["trainer=gpu", "logger=none"]
NCCL = ["trainer.accelerator=gpu", "trainer.devices=1", "logger=none"]


def fvu_of(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["fvu"]


@pytest.fixture(scope="module")
def alone(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path_factory.mktemp("gpu"), *GPU))
    assert status == 0
    return folder


@pytest.mark.parametrize("trainer", ["ddp", "sae_parallel"])
def test_one_process_over_nccl_gives_what_one_without_gives(
    trainer: str, alone: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    try:
        arguments = overrides(tiny_lm, tiny_text, tmp_path, f"trainer={trainer}", *NCCL)
        status, folder = run(arguments)
        assert torch.distributed.get_backend() == "nccl"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert status == 0
    for name, tensor in saved(alone).items():
        torch.testing.assert_close(tensor, saved(folder)[name], rtol=1e-5, atol=1e-6)


def test_what_lies_on_the_host_is_summed_over_nccl(tmp_path: Path) -> None:
    """As after the last step, when Lightning has brought the suite back to the host."""
    joint = JointStep([], make_optim(), "stop", sharing=2, device=torch.device("cuda", 0))
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        total = joint.all_sum(torch.arange(3))
    finally:
        torch.distributed.destroy_process_group()
    assert total.tolist() == [0, 1, 2]
    assert total.device.type == "cpu"


def test_a_gpu_learns_what_a_cpu_learns(
    alone: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path, "logger=none"))
    assert status == 0
    assert fvu_of(folder) == pytest.approx(fvu_of(alone), rel=1e-2)


def test_a_language_model_in_bfloat16_costs_little(
    alone: Path, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path, *GPU, "model.dtype=bfloat16"))
    assert status == 0
    assert fvu_of(folder) == pytest.approx(fvu_of(alone), rel=5e-2)


def test_the_dry_run_forecasts_the_memory_that_the_run_takes(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = overrides(
        tiny_lm, tiny_text, tmp_path, *GPU, "sae.expansion=512", "groups=per_layer",
        "dead_after=100000000",
    )  # fmt: skip
    assert run([*arguments, "dry_run=true"])[0] == 0
    forecast = count(rows_of(capsys.readouterr().out)["peak memory, by a trial"][0])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    status, folder = run(arguments)
    assert status == 0
    used = json.loads((folder / "summary.json").read_text())["peak_gpu_memory_gb"] * 2**30
    assert forecast == pytest.approx(used, rel=0.15)
