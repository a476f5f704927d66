"""A frozen language model from a folder, and the bundled one."""

import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast

from groupsae.data.packing import split_of
from groupsae.data.sources import PythonSource
from groupsae.runtime.errors import UserError
from tests.helpers.hub_stand_in import ask, serving
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


# ---- the tokenizer ----------------------------------------------------------------------------


def without_tokenizer(folder, target):
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("tokenizer*"))


def test_a_model_without_tokenizer_files_gets_one_that_reads_no_text(tiny_lm, tmp_path):
    """Transformers makes one up, which turns every text into nothing."""
    tokenizer = frozen(without_tokenizer(tiny_lm, tmp_path / "lm")).tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)  # of the config
    assert tokenizer("some text")["input_ids"] == []


def test_so_does_a_model_for_which_transformers_makes_up_none(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=20, bos_token_id=1, eos_token_id=[2, 3],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    tokenizer = frozen(tmp_path).tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the tokenizer of model"):
        frozen(tmp_path).tokenizer()


def test_a_tokenizer_that_knows_no_english_is_kept(tiny_lm, tmp_path):
    genes = Tokenizer(BPE({"A": 0, "C": 1, "G": 2, "T": 3}, []))
    folder = without_tokenizer(tiny_lm, tmp_path / "lm")
    PreTrainedTokenizerFast(tokenizer_object=genes).save_pretrained(folder)
    assert frozen(folder).tokenizer()("GA", add_special_tokens=False)["input_ids"] == [2, 0]


# ---- models on the Hub ------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as running:
        ask(running, monkeypatch, tmp_path)
        running.repos["me/lm"] = []
        yield running


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_fingerprint_of_a_hub_model_follows_its_commit(hub, tiny_lm):
    first = hub.commit("me/lm", files_of(tiny_lm))
    key = frozen("me/lm").fingerprint()
    assert frozen("me/lm").fingerprint() == key
    hub.commit("me/lm", {**files_of(tiny_lm), "README.md": b"moved"})
    assert frozen("me/lm").fingerprint() != key
    assert frozen("me/lm", revision=first).fingerprint() == key
    hub.tags["v1"] = first
    assert frozen("me/lm", revision="v1").fingerprint() == key


def test_a_hub_model_in_a_subfolder_and_another_cache_has_its_commit_too(hub, tiny_lm, tmp_path):
    deep = {f"deep/{name}": content for name, content in files_of(tiny_lm).items()}
    hub.commit("me/lm", deep)
    load = {"subfolder": "deep", "cache_dir": str(tmp_path / "other")}
    key = frozen("me/lm", load=load).fingerprint()
    hub.commit("me/lm", {**deep, "README.md": b"moved"})
    assert frozen("me/lm", load=load).fingerprint() != key


def test_a_hub_model_without_tokenizer_reads_no_text(hub, tiny_lm):
    files = {n: c for n, c in files_of(tiny_lm).items() if not n.startswith("tokenizer")}
    hub.commit("me/lm", files)
    assert frozen("me/lm").tokenizer()("some text")["input_ids"] == []
    hub.commit("me/lm", files_of(tiny_lm))
    assert len(frozen("me/lm").tokenizer()) > 300


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
