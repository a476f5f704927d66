"""A tiny Llama in a GGUF file, for tests and for `size=smallest`."""

from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

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
