"""A frozen language model from a folder, the bundled one, and what pretraining starts from."""

import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from groupsae.data.packing import split_of
from groupsae.data.sources import PythonSource
from groupsae.lm.build import build_gpt_neox, stack_layers, train_tokenizer
from groupsae.runtime.errors import UserError
from tests.helpers.lms import frozen

CPU = torch.device("cpu")


def test_a_folder_gives_geometry_blocks_and_tokenizer(tiny_lm):
    lm = frozen(tiny_lm)
    sizes = lm.geometry
    assert (sizes.num_layers, sizes.d_model, sizes.context, sizes.vocab_size) == (4, 32, 64, 512)
    hooked = lm.load(CPU)
    assert len(hooked.blocks) == 4
    assert not hasattr(hooked.model, "embed_out")
    assert lm.tokenizer().eos_token_id == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_frozen_evaluating_and_of_the_dtype_asked_for(tiny_lm, dtype):
    for lm in (frozen(tiny_lm, dtype=dtype).load(CPU), frozen(tiny_lm).load_with_head(CPU)):
        model = lm.model
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    model = frozen(tiny_lm, dtype=dtype).load(CPU).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_the_head_sits_on_the_same_model(tiny_lm):
    lm = frozen(tiny_lm)
    bare, hooked = lm.load(CPU).model, lm.load_with_head(CPU)
    whole, blocks = hooked.model, hooked.blocks
    tokens = torch.arange(10).reshape(1, 10)
    hidden = bare(input_ids=tokens).last_hidden_state
    logits = whole(input_ids=tokens).logits
    assert logits.shape == (1, 10, 512)
    torch.testing.assert_close(whole.get_output_embeddings()(hidden), logits)
    assert blocks[0] is whole.gpt_neox.layers[0]


@pytest.mark.parametrize("dtype", ["float33", "int8", "complex64", "nn", ""])
def test_an_unknown_or_unfit_dtype_is_refused(tiny_lm, dtype):
    with pytest.raises(UserError, match=f"model.dtype is '{dtype}'; use float32"):
        frozen(tiny_lm, dtype=dtype)


@pytest.mark.parametrize("name", ["no-such/model", "no_such_model", "/no/such/folder", "tiiny"])
def test_an_unknown_model_is_one_sentence_without_network(name, monkeypatch):
    # Offline at once: on a machine whose network fails, the Hub's client first tries for 24 s.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"cannot load model '{name}'.*model=tiny needs no"):
        frozen(name)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot load model"):
        frozen(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"')
    with pytest.raises(UserError, match="cannot load model"):
        frozen(tmp_path)


def test_damaged_weights_are_one_sentence(tiny_lm, tmp_path):
    folder = shutil.copytree(tiny_lm, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load model"):
        frozen(folder).load(CPU)
    weights.unlink()
    with pytest.raises(UserError, match="cannot load model"):
        frozen(folder).load(CPU)


def test_the_fingerprint_follows_weights_and_dtype_and_not_the_folders_name(tiny_lm, tmp_path):
    folder = shutil.copytree(tiny_lm, tmp_path / "copy")
    before = frozen(tiny_lm).fingerprint()
    assert frozen(folder).fingerprint() == before
    assert frozen(folder, dtype="bfloat16").fingerprint() != before
    weights = load_file(folder / "model.safetensors")
    name = next(n for n, value in weights.items() if value.ndim == 2)
    weights[name][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert frozen(folder).fingerprint() != before


def small(num_layers, seed):
    torch.manual_seed(seed)
    return build_gpt_neox(
        num_layers=num_layers, d_model=16, num_heads=2, vocab_size=40, context=8
    ).eval()


def test_stacked_layers_are_copies_of_the_shallow_ones():
    shallow, deep = small(2, seed=0), small(6, seed=1)
    stack_layers(shallow, deep)
    for i, layer in enumerate(deep.gpt_neox.layers):
        for name, value in layer.state_dict().items():
            source = shallow.gpt_neox.layers[i % 2].state_dict()[name]
            assert torch.equal(value, source)
            assert value.data_ptr() != source.data_ptr()
    for name in ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"):
        ours, theirs = deep.get_submodule(name), shallow.get_submodule(name)
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )


def test_a_stack_of_the_same_depth_gives_the_same_logits():
    shallow, same = small(3, seed=0), small(3, seed=1)
    tokens = torch.arange(8).reshape(1, 8)
    assert not torch.equal(shallow(tokens).logits, same(tokens).logits)
    stack_layers(shallow, same)
    assert torch.equal(shallow(tokens).logits, same(tokens).logits)


def test_a_stack_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="cannot stack 2 layers into 5"):
        stack_layers(small(2, seed=0), small(5, seed=1))


def test_a_trained_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 9, vocab_size=280, context=16)
    assert len(tokenizer) <= 280
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    for text in ("def f(y):\n\treturn  y", "grüße, 世界 🙂", " \n leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# ---- the bundled model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return frozen("tiny")


def test_the_bundled_model_is_the_promised_gpt_neox(bundled):
    sizes = bundled.geometry
    assert (sizes.num_layers, sizes.d_model, sizes.context) == (12, 128, 256)
    assert sizes.vocab_size == len(bundled.tokenizer()) == 4096
    hooked = bundled.load(CPU)
    model, blocks = hooked.model, hooked.blocks
    assert model.config.model_type == "gpt_neox"
    assert model.config.num_attention_heads == 4
    assert len(blocks) == 12
    size = sum(file.stat().st_size for file in Path(bundled.path).iterdir())
    assert size < 8e6


def heldout_blocks(tokenizer, every):
    """Return every n-th block of 256 tokens of the standard library's held-out files."""
    documents = PythonSource(packages=False).documents()
    texts = [d.text for d in documents if split_of(d.name, 0.02, 0.02) == "heldout"]
    ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], 0]]
    return torch.tensor(ids[: len(ids) // 256 * 256]).reshape(-1, 256)[::every]


def test_the_bundled_model_reads_heldout_python_below_three_nats_per_token(bundled):
    # A random model has ln 4096 = 8.3 nats. The model card's figure is over packages as well.
    tokenizer, model = bundled.tokenizer(), bundled.load_with_head(CPU).model
    blocks = heldout_blocks(tokenizer, every=4)
    assert len(blocks) > 50
    with torch.no_grad():
        logits = model(input_ids=blocks, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    assert math.isfinite(loss)
    assert loss < 3.0, f"{loss:.2f} nats per token on held-out files"
