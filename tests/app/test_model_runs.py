"""The main job, with its evaluation, on other families, stacks and hookpoints than the default."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from groupsae.runtime.errors import UserError
from tests.helpers import families
from tests.helpers.evaluated import blocks, evaluate, read
from tests.helpers.runs import overrides, run

MORE = ("groups=count", "groups.num_groups=1", "evaluate=true", "evaluation.together=true")
SLOW = [
    ("gpt2", "resid_pre"), ("llama", "mlp_out"), ("mistral", "resid_post"),
    ("qwen2", "attn_out"), ("qwen3_moe", "mlp_out"), ("gemma3", "attn_out"), ("phi3", "mlp_out"),
    ("opt", "mlp_out"), ("olmo2", "attn_out"), ("falcon", "mlp_out"), ("multimodal", "resid_post"),
    ("t5gemma.decoder", "mlp_out"), ("bart.encoder", "attn_out"), ("t5.encoder", "mlp_out"),
    ("modernbert", "attn_out"), ("roberta", "resid_pre"), ("gemma2", "attn_out"),
    ("bart.decoder", "resid_pre"),
]  # fmt: skip
QUICK = [("mixtral", "mlp_out"), ("t5.decoder", "resid_pre"), ("bert", "attn_out")]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("family", "hookpoint"), CASES)
def test_a_run_trains_saves_and_evaluates(
    family: str, hookpoint: str, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    kind, _, stack = family.partition(".")
    lm = families.save(kind, tmp_path / "lm", tiny_lm)
    chosen = [f"model.hookpoint={hookpoint}", f"model.stack={stack or 'null'}"]
    status, folder = run(overrides(lm, tiny_text, tmp_path / "out", *MORE, *chosen))
    assert status == 0
    depth = families.LAYERS + (stack == "decoder")
    for file in folder.glob("saes/*/cfg.json"):
        config = json.loads(file.read_text())
        reads = stack or ("encoder" if kind in families.ENCODERS else "decoder")
        assert (config["hookpoint"], config["stack"]) == (hookpoint, reads)
        assert (config["context"], config["dtype"], config["revision"]) == (64, "float32", None)
    evaluation = read(folder)
    assert [row["layer"] for row in evaluation["layers"]] == list(range(depth))
    assert evaluation["stack"] == reads
    # after six steps, activations that are nearly constant have an FVU of hundreds
    assert all(row["fvu"]["value"] > 0 for row in evaluation["results"])
    assert all(0 < row["l0"]["value"] <= 4 for row in evaluation["results"])
    together = evaluation["groupings"][0]["spliced_together"]
    if reads == "encoder":
        assert "ce" not in evaluation
        assert evaluation["predictions"] == 0
        for row in evaluation["results"]:
            assert 0 < row["embedding_loss"]["value"] < 2
            assert abs(row["retrieval_loss"]["value"]) <= 1
        assert together["embedding_loss"]["value"] > 0
    else:
        losses = [row["delta_ce"]["value"] for row in evaluation["results"]]
        assert all(loss is not None and loss != 0 for loss in losses)
        assert together["kl"]["value"] > 0
        assert evaluation["predictions"] == evaluation["sequences"] * 63


def test_the_loss_of_a_decoder_behind_an_encoder_is_teacher_forced(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Position t reads the tokens before t and predicts token t; the last predicts nothing."""
    from transformers import AutoModelForSeq2SeqLM

    lm = families.save("bart", tmp_path / "lm", tiny_lm)
    status, folder = run(overrides(lm, tiny_text, tmp_path / "out", *MORE, "model.stack=decoder"))
    assert status == 0
    model, ce, count = AutoModelForSeq2SeqLM.from_pretrained(lm).eval(), 0.0, 0
    text, evaluation = blocks(folder, "heldout"), read(folder)
    order = torch.from_numpy(sample(len(text), evaluation["sequences"]))
    for tokens in text[order]:
        shifted = torch.tensor([[0, *tokens[:-1].tolist()]])
        with torch.no_grad():
            logits = model(input_ids=tokens[None], decoder_input_ids=shifted).logits[0].double()
        chances = logits.log_softmax(-1).gather(1, tokens[:, None])[:-1]
        ce, count = ce - float(chances.sum()), count + len(chances)
    assert evaluation["ce"]["value"] == pytest.approx(ce / count, abs=1e-5)


def sample(blocks: int, sequences: int) -> np.ndarray:
    """Return which blocks an evaluation takes."""
    return np.random.default_rng([0, 0]).permutation(blocks)[:sequences]


def test_a_measurement_of_another_hookpoint_is_not_reused(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    found = []
    for more in ([], ["model.hookpoint=mlp_out", "stream.max_norm_ratio=1.5"]):
        status, folder = run(overrides(tiny_lm, tiny_text, tmp_path, "tokens=512", *more))
        assert status == 0
        measured = json.loads((folder / "groups.json").read_text())["measured"]
        found.append((measured["hookpoint"], measured["max_norm_ratio"], measured["stack"]))
    assert found == [("resid_post", None, "decoder"), ("mlp_out", 1.5, "decoder")]
    assert len(list((tmp_path / "cache" / "angles").glob("*.npz"))) == 2


def test_filtered_positions_are_left_out_of_training_and_evaluation(
    tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    filters = ["stream.skip_positions=8", "stream.max_norm_ratio=1.1", "stream.prepend_bos=true"]
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path, *MORE, *filters))
    assert status == 0
    evaluation = read(folder)
    assert (evaluation["skip_positions"], evaluation["max_norm_ratio"]) == (8, 1.1)
    assert evaluation["tokens"] == evaluation["sequences"] * (64 - 8)
    assert evaluation["predictions"] == evaluation["sequences"] * (64 - 8 - 1)
    for file in folder.glob("saes/*/cfg.json"):
        config = json.loads(file.read_text())
        assert (config["skip_positions"], config["max_norm_ratio"]) == (8, 1.1)
        assert 0 < config["tokens"] < 3072 * (64 - 8) / 64  # the norms leave out more
    again = evaluate(folder, "evaluation.exclude_special_tokens=true", "evaluation.tokens=4096")
    text = blocks(folder, "heldout")
    read_there = text[torch.from_numpy(sample(len(text), again["sequences"]))][:, 8:]
    assert again["sequences"] * (64 - 8) > again["tokens"] == int((read_there != 0).sum())
    assert again["skip_positions"] == 8


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("model.hookpoint=resid_mid", "model.hookpoint is 'resid_mid'; use resid_pre"),
        ("model.stack=encoder", "model.stack is 'encoder', but .* has decoder"),
        ("model.blocks_path=transformer.h", r"'transformer.h', which names no .*layers \(4\)"),
        ("stream.skip_positions=64", "stream.skip_positions is 64; .* from 0 to 63"),
        ("stream.skip_positions=-1", "stream.skip_positions is -1"),
        ("stream.max_norm_ratio=1", "stream.max_norm_ratio is 1; .* above 1, such as 10, or null"),
        ("stream.max_norm_ratio=much", "stream.max_norm_ratio is 'much'"),
        ("+model.load.torch_dtype=float16", "use model.dtype"),
        ("+model.load.device_map=auto", "needs the package accelerate, not installed"),
        ("+model.load.gguf_file=m.gguf", "pip install accelerate gguf"),
    ],
)
def test_bad_values_are_named_before_training_starts(
    argument: str,
    sentence: str,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("groupsae.lm.options.find_spec", lambda _: None)  # accelerate may be there
    with pytest.raises(UserError, match=sentence):
        run(overrides(tiny_lm, tiny_text, tmp_path, argument))
    assert not list(tmp_path.rglob("*.ckpt"))
