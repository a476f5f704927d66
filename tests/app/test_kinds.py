"""The main job with every kind of SAE: trained, saved, loaded, evaluated, resumed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from groupsae.suite.suite import load_suite
from tests.helpers.evaluated import evaluate
from tests.helpers.runs import overrides, run, saved, stopped

OWN = ["sae.layer_bias=per_layer", "sae.layer_rank=2"]
SPARSITY = {
    "batchtopk": "sae.k=4",
    "matryoshka": "sae.k=4",
    "jumprelu": "sae.target_l0=4",
    "relu": "sae.l1_coefficient=0.3",
    "gated": "sae.l1_coefficient=0.3",
}


def command(lm: Path, text: Path, output: Path, kind: str, *more: str) -> list[str]:
    """Return the command line of a short run with another kind of SAE than TopK."""
    usual = [each for each in overrides(lm, text, output) if not each.startswith("sae.k=")]
    return [*usual, f"sae={kind}", SPARSITY[kind], *more]


@pytest.fixture(scope="module", params=SPARSITY)
def finished(
    request: pytest.FixtureRequest, tiny_lm: Path, tiny_text: Path, tmp_path_factory: Any
) -> Path:
    output = tmp_path_factory.mktemp(request.param)
    status, folder = run(
        command(
            tiny_lm, tiny_text, output, request.param, "groups=even", "groups.num_groups=2",
            *(OWN if request.param in ("batchtopk", "relu", "gated") else []),
        )
    )  # fmt: skip
    assert status == 0
    return folder


def test_losses_are_logged_by_name(finished: Path) -> None:
    lines = (finished / "metrics.csv").read_text().splitlines()
    suite = load_suite(finished)
    for name, sae in suite.saes.items():
        for term in {*sae.terms} - {"auxk"}:
            assert sum(f"train/{term}/{name}" in line for line in lines) == 6, term


def test_planned_flops_are_the_counted_ones(finished: Path) -> None:
    parts = {p["part"]: p for p in json.loads((finished / "ledger.json").read_text())["parts"]}
    assert parts["saes"]["planned_flops"] > 0
    if "relu" not in finished.name or "jumprelu" in finished.name:  # see test_sae_family
        assert parts["saes"]["planned_flops"] == parts["saes"]["measured_flops"]


def test_evaluation_finds_what_validation_found(finished: Path) -> None:
    """State besides the weights (thresholds) is saved too, or L0 and FVU would differ."""
    found = evaluate(finished)
    summary = json.loads((finished / "summary.json").read_text())
    for sae in found["saes"]:
        validated = summary["groups"][sae["name"]]
        assert sae["l0"]["value"] == pytest.approx(validated["l0"], rel=1e-3)
        assert sae["fvu"]["value"] == pytest.approx(validated["fvu"], rel=1e-3)


TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=none"]


def in_two_processes(arguments: list[str], output: Path) -> Path:
    """Train as the command line would, in two processes; return the run folder."""
    done = subprocess.run(
        [sys.executable, "-m", "groupsae.train", *arguments, *TWO],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (p.parent for p in output.rglob("summary.json"))
    return folder


def test_two_processes_share_one_threshold(tiny_lm: Path, tiny_text: Path, tmp_path: Path) -> None:
    """With one each, validation over both would see another L0 than the saved SAE has."""
    arguments = command(tiny_lm, tiny_text, tmp_path, "batchtopk", "groups=even")
    folder = in_two_processes([*arguments, "groups.num_groups=2"], tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    for sae in evaluate(folder)["saes"]:
        assert sae["l0"]["value"] == pytest.approx(summary["groups"][sae["name"]]["l0"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_aim_at_one_l0(tiny_lm: Path, tiny_text: Path, tmp_path: Path) -> None:
    groups = ["groups=even", "groups.num_groups=2", *OWN]
    one = run(command(tiny_lm, tiny_text, tmp_path / "one", "jumprelu", *groups))[1]
    two = tmp_path / "two"
    folder = in_two_processes(command(tiny_lm, tiny_text, two, "jumprelu", *groups), two)
    for name, tensor in saved(one).items():
        # float32 sums in another order, through six Adam steps of up to 1e-3 * 16 each
        torch.testing.assert_close(tensor, saved(folder)[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", [pytest.param("jumprelu", marks=pytest.mark.slow), "relu"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path, kind: str
) -> None:
    """Of a kind with parameters of its own, and of one that folds its norms after each step."""
    groups = ["groups=even", "groups.num_groups=1", *(OWN if kind == "relu" else [])]
    whole = run(command(tiny_lm, tiny_text, tmp_path / "whole", kind, *groups))[1]
    parts = stopped(command(tiny_lm, tiny_text, tmp_path / "parts", kind, *groups))[1]
    assert run([f"resume={parts}"])[0] == 0
    for name, tensor in saved(whole).items():
        assert torch.equal(tensor, saved(parts)[name]), name


def test_a_resumed_run_with_every_schedule_is_the_same_bit_for_bit(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    arguments = [
        "sae.k_start=8", "sae.sparsity_warmup=0.8", "optim.warmup=0.3",
        "optim.decay=cosine", "optim.decay_share=0.5", "b_dec_start=geometric_median",
        "calibration.scale=sqrt_d", "sae.tied=false", "sae.layer_rank=3",
    ]  # fmt: skip
    whole = command(tiny_lm, tiny_text, tmp_path / "whole", "matryoshka", *arguments)
    status, folder = run(whole)
    assert status == 0
    assert stopped(command(tiny_lm, tiny_text, tmp_path / "parts", "matryoshka", *arguments))[0]
    parts = next((tmp_path / "parts").glob("*/*/*/checkpoints")).parent
    status, _ = run([f"resume={parts}"])
    assert status == 0
    expected, found = saved(folder), saved(parts)
    assert any(name.endswith("threshold") for name in expected)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    plain = run(command(tiny_lm, tiny_text, tmp_path / "plain", "matryoshka"))[1]
    assert not torch.equal(*(next(iter(saved(f).values())) for f in (folder, plain)))
