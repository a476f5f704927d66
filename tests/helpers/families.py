"""Tiny random models of many families, saved to a folder and loaded by path as a user would."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MptConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    T5GemmaConfig,
)

LAYERS, VOCAB, WIDTH, CONTEXT = 3, 512, 16, 64
NAMES = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": VOCAB}
SMALL = NAMES | {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
GATED = SMALL | {"intermediate_size": 32, "max_position_embeddings": CONTEXT}
SHARED = GATED | {"num_key_value_heads": 2}  # grouped queries
HEADS = SHARED | {"head_dim": 4}
SLIDING = HEADS | {"sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXT = Gemma3TextConfig(**SLIDING)
STACK = {k: v for k, v in SLIDING.items() if k != "num_hidden_layers"}

DECODERS: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**GATED),
    "gpt2": GPT2Config(**NAMES, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=CONTEXT),
    "llama": LlamaConfig(**SHARED),
    "mistral": MistralConfig(**SHARED, sliding_window=4),
    "mixtral": MixtralConfig(**SHARED, num_local_experts=4),
    "qwen2": Qwen2Config(**SHARED),
    "qwen2_moe": Qwen2MoeConfig(**SHARED, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": Qwen3Config(**HEADS),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, **EXPERTS),
    "gemma": GemmaConfig(**HEADS),
    "gemma2": Gemma2Config(**SLIDING),
    "gemma3": TEXT,
    "gpt_oss": GptOssConfig(**SLIDING, num_local_experts=4),
    "phi": PhiConfig(**GATED),
    "phi3": Phi3Config(**GATED),
    "opt": OPTConfig(
        **SMALL, ffn_dim=32, max_position_embeddings=CONTEXT, word_embed_proj_dim=WIDTH
    ),
    "olmo": OlmoConfig(**SHARED),
    "olmo2": Olmo2Config(**SHARED),
    "olmo3": Olmo3Config(**SHARED, sliding_window=4),
    "olmoe": OlmoeConfig(**SHARED, num_experts=4, num_experts_per_tok=2),
    "glm4": Glm4Config(**HEADS),
    "exaone4": Exaone4Config(**SLIDING),
    "bloom": BloomConfig(**NAMES, hidden_size=WIDTH, n_layer=LAYERS, n_head=4),
    "falcon": FalconConfig(**SMALL),
    "mpt": MptConfig(**NAMES, d_model=WIDTH, n_layers=LAYERS, n_heads=4, max_seq_len=CONTEXT),
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**GATED),
    "roberta": RobertaConfig(**{**GATED, "max_position_embeddings": CONTEXT + 2}),
    "modernbert": ModernBertConfig(
        **GATED, cls_token_id=0, sep_token_id=0, local_attention=8, global_attn_every_n_layers=2
    ),
}
# stacks of unlike depth, so that one is never taken for the other
PAIRS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(
        **NAMES, d_model=WIDTH, d_ff=32, d_kv=4, num_heads=4, num_layers=LAYERS,
        num_decoder_layers=LAYERS + 1, decoder_start_token_id=1,
    ),
    "bart": BartConfig(
        **NAMES, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS + 1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_position_embeddings=CONTEXT, decoder_start_token_id=0,
    ),
    "t5gemma": T5GemmaConfig(
        encoder={**STACK, "num_hidden_layers": LAYERS},
        decoder={**STACK, "num_hidden_layers": LAYERS + 1, "cross_attention_hidden_size": WIDTH},
        **NAMES,
    ),
}  # fmt: skip
MULTIMODAL = Gemma3Config(
    text_config=TEXT.to_dict(),
    vision_config={
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
    mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
)  # fmt: skip


def auto_class(family: str) -> Any:
    """Return the class of the complete model, with its head."""
    if family in DECODERS:
        return AutoModelForCausalLM
    if family == "multimodal":
        return AutoModelForImageTextToText
    return AutoModelForMaskedLM if family in ENCODERS else AutoModelForSeq2SeqLM


def config_of(family: str) -> PreTrainedConfig:
    """Return the config of a family."""
    everything = {**DECODERS, **ENCODERS, **PAIRS, "multimodal": MULTIMODAL}
    return everything[family]


def save(family: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """Write a random model of a family, every weight of which does something; return the folder.

    Args:
        family: its name here.
        folder: to write into.
        tokenizer: folder of a tokenizer with 512 tokens to put next to it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(family).from_config(config_of(family))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        assert tokenizer is not None
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def draw_tokens(blocks: int = 2, length: int = 12) -> torch.Tensor:
    """Return random tokens, some of them the padding token: in packed text that is text, too."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, VOCAB, (blocks, length), generator=generator)
    tokens[:, 5] = 1
    return tokens
