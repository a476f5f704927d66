"""Runs that read activations from a store: the results of streaming, and no language model."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from groupsae.config.identity import content_hash
from groupsae.config.values import check_training
from groupsae.runtime.errors import UserError
from tests.helpers.runs import composed, overrides, run, saved, stopped

TWO = ["groups=explicit", "groups.groups=[[0,1],[2]]"]


@pytest.fixture(scope="module")
def start(tiny_lm, tiny_text, tmp_path_factory):
    """Return a function that gives the command line of a run, with and without store."""
    folder = tmp_path_factory.mktemp("store")

    def command(output: str, *more: str, dtype: str | None = "float32") -> list[str]:
        kept = [f"data.cache={folder / 'activations'}", f"data.cache_dtype={dtype}"]
        return overrides(
            tiny_lm, tiny_text, folder / output, *TWO, *(kept if dtype else ()), *more
        )

    command.store = folder / "activations"
    return command


@pytest.fixture(scope="module")
def streamed(start):
    return saved(run(start("streamed", dtype=None))[1])


@pytest.fixture(scope="module")
def filled(start):
    """Return the run folder of the run that filled the store."""
    return run(start("filled"))[1]


@pytest.fixture
def without_model(monkeypatch):
    """Let no weights of a language model be loaded."""
    from groupsae.lm.load import FrozenLM

    def load(*_):
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr(FrozenLM, "load", load)


def shards(store: Path, split: str = "*") -> dict[Path, tuple[int, int]]:
    """Return the files of a store with what changes when one is written again."""
    found = {p: p.stat() for p in store.glob(f"*/{split}/*/layer.*.safetensors")}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_float32_store_gives_the_weights_of_the_stream_bit_for_bit(streamed, filled):
    assert same(saved(filled), streamed)


def test_training_from_a_full_store_needs_no_model(start, streamed, filled, without_model):
    before = shards(start.store)
    status, again = run(start("again"))
    assert status == 0
    assert same(saved(again), streamed)
    assert shards(start.store) == before
    ledger = json.loads((again / "ledger.json").read_text())
    parts = {part["part"]: part for part in ledger["parts"]}
    assert parts["activations"]["measured_flops"] == 0 < parts["activations"]["planned_flops"]
    assert parts["store"]["seconds"] == 0
    measured = json.loads((again / "groups.json").read_text())["measured"]
    assert measured["stored"] == "float32"


def test_a_run_from_the_store_resumes_bit_for_bit(start, streamed, filled, without_model):
    status, folder = stopped(start("stopped"))
    assert status == 143
    assert run(start("stopped")) == (0, folder)
    assert same(saved(folder), streamed)


def test_bfloat16_is_near(start, streamed):
    folder = run(start("rounded", dtype="bfloat16"))[1]
    rounded = saved(folder)
    assert rounded.keys() == streamed.keys()
    assert not same(rounded, streamed)
    for name, tensor in streamed.items():
        # measured: at most 0.08, of b_enc; 8 bits turn a choice of latents here and there
        assert (rounded[name] - tensor).norm() / tensor.norm() < 0.15, name


def test_a_store_belongs_to_the_content_of_a_run_by_its_dtype_only(start):
    hashes = {
        name: content_hash(OmegaConf.to_container(composed(start("any", *more, dtype=dtype))))
        for name, dtype, more in [
            ("none", None, []),
            ("none, of another dtype", None, ["data.cache_dtype=float32"]),
            ("float32", "float32", []),
            ("elsewhere", "float32", ["data.cache=elsewhere"]),
            ("bfloat16", "bfloat16", []),
        ]
    }
    assert hashes["none"] == hashes["none, of another dtype"]
    assert hashes["float32"] == hashes["elsewhere"]
    assert len(set(hashes.values())) == 3


@pytest.mark.parametrize(
    ("key", "value"), [("data.cache_dtype", "int8"), ("data.cache", "5"), ("data.cache", "''")]
)
def test_a_wrong_option_is_named_before_anything_is_packed(start, key, value):
    with pytest.raises(UserError, match=f"{key} is .*(float32|null)"):
        check_training(composed(start("any", f"{key}={value}")))
