"""The main job with every kind of SAE: trained, saved, loaded, evaluated, resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import evaluate
from runs import overrides, run, saved, stopped

from groupsae.interop.suite import load_suite

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
        command(tiny_lm, tiny_text, output, request.param, "groups=even", "groups.num_groups=2")
    )
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
    """State beside the weights (thresholds) is saved too, or L0 and FVU would differ."""
    found = evaluate(finished)
    summary = json.loads((finished / "summary.json").read_text())
    for sae in found["saes"]:
        validated = summary["groups"][sae["name"]]
        assert sae["l0"]["value"] == pytest.approx(validated["l0"], rel=1e-3)
        assert sae["fvu"]["value"] == pytest.approx(validated["fvu"], rel=1e-3)


def test_a_stopped_run_with_every_schedule_goes_on_bit_for_bit(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    arguments = [
        "sae.k_start=8", "sae.sparsity_warmup=0.8", "optim.warmup=0.3",
        "optim.decay=cosine", "optim.decay_share=0.5", "b_dec_start=geometric_median",
        "calibration.scale=sqrt_d", "sae.tied=false",
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
