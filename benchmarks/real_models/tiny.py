"""Tiny models with random weights, for tests and for `size=smallest`."""

import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.pretraining.model import train_tokenizer
from benchmarks.real_models.packages import convert_gguf
from benchmarks.real_models.study import MODELS, Study
from benchmarks.timing import SMALLEST_RUN

CONTEXT, LAYERS, WIDTH, HIDDEN, HEADS = 128, 4, 32, 64, 4


def write_gguf(path: Path, seed: int = 0) -> None:
    """Write a Llama of 4 layers with random weights, and a tokenizer of bytes."""
    import gguf

    generator = np.random.default_rng(seed)
    # by default a byte-level BPE needs one merge
    vocabulary = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(LAYERS)
    file.add_context_length(CONTEXT)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(vocabulary))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(vocabulary)
    file.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))  # control, normal
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)

    def random(name: str, *shape: int) -> None:
        values = 0.2 * generator.standard_normal(shape)
        file.add_tensor(f"{name}.weight", values.astype(np.float32))

    def ones(name: str) -> None:
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    random("token_embd", len(vocabulary), WIDTH)
    random("output", len(vocabulary), WIDTH)
    ones("output_norm")
    for block in (f"blk.{number}" for number in range(LAYERS)):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            random(f"{block}.{name}", WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            random(f"{block}.{name}", HIDDEN, WIDTH)
        random(f"{block}.ffn_down", WIDTH, HIDDEN)
        ones(f"{block}.attn_norm")
        ones(f"{block}.ffn_norm")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def tiny_study(cache: Path) -> Iterator[Study]:
    """Yield the study of a decoder (from a GGUF file, if gguf can write one) and of an encoder."""
    text = Path(statistics.__file__).read_text()
    for folder in (cache / "english", cache / "languages"):
        folder.mkdir()
        for number, start in enumerate(range(0, len(text), 2_000)):
            (folder / f"{number}.txt").write_text(text[start : start + 2_000])
    (cache / "labels").mkdir()
    rows = [f"def f{number}(,name\nx = {number},number\n" for number in range(20)]
    (cache / "labels" / "names.csv").write_text("text,label\n" + "".join(rows))
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "vocab_size": 1024}
    torch.manual_seed(0)
    decoder, encoder = cache / "gemma-3-270m", cache / "all-MiniLM-L6-v2"
    if find_spec("gguf") and find_spec("accelerate"):
        write_gguf(cache / "tiny.gguf")
        convert_gguf(cache / "tiny.gguf", decoder)
    else:
        GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(decoder)
        train_tokenizer([text], 1024, CONTEXT).save_pretrained(decoder)
    BertModel(BertConfig(**sizes)).save_pretrained(encoder)
    train_tokenizer([text], 1024, CONTEXT).save_pretrained(encoder)
    few = [each for each in SMALLEST_RUN if not each.startswith("stream.max_tokens")]
    for name, model in MODELS.items():
        MODELS[name] = model._replace(
            shorter=(), looked_at=(1,), spliced=(1,) if model.spliced else ()
        )
        yield Study(name, cache, [*few, "sae.k=4", "stream.max_tokens=null"])
