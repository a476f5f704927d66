"""The language model of the whole loop: GPT-NeoX of Pythia-70M's shape with random weights."""

import json
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from groupsae.lm import BUNDLED

VOCAB, CONTEXT, BLOCKS = 50_304, 256, 800


def write_lm(folder: Path) -> None:
    """Write model, tokenizer and random tokens into a folder that every contender can read."""
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    # the text is given as tokens; a tokenizer is only asked for its end-of-text token
    PreTrainedTokenizerFast.from_pretrained(BUNDLED["tiny"]).save_pretrained(folder)
    tokens = torch.randint(1, VOCAB, (BLOCKS, CONTEXT)).tolist()
    lines = [json.dumps({"tokens": block}) for block in tokens]
    (folder / "tokens.jsonl").write_text("\n".join(lines) + "\n")
