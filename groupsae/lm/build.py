"""A fresh GPT-NeoX (the Pythia architecture) and its tokenizer, for pretraining."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `vocab_size` entries, trained on `texts`.

    Entry 0 is the end-of-text token (also BOS), as in Pythia's tokenizer. Every byte is in the
    vocabulary, so no token is unknown.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_gpt_neox(
    *, num_layers: int, d_model: int, num_heads: int, vocab_size: int, context: int
) -> GPTNeoXForCausalLM:
    """Return a randomly initialised GPT-NeoX, proportioned as Pythia (MLP of 4 d_model)."""
    config = GPTNeoXConfig(
        num_hidden_layers=num_layers,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_attention_heads=num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


@torch.no_grad()
def stack_layers(shallow: GPTNeoXForCausalLM, deep: GPTNeoXForCausalLM) -> None:
    """Initialise a deep model from a trained shallow one by repeating its layers.

    Layer i becomes a copy of layer i mod n; embeddings, final norm and head are copied too (the
    depth-wise "G_stack" growth of arXiv 2405.15319). So the first tokens of a deep model's
    training cost what they cost a shallow one.

    Raises:
        ValueError: the deep model's number of layers is not a multiple of the shallow model's.
    """
    n, m = shallow.config.num_hidden_layers, deep.config.num_hidden_layers
    if m % n:
        raise ValueError(f"cannot stack {n} layers into {m}: not a multiple")

    def copy(source: nn.Module, target: nn.Module) -> None:
        target.load_state_dict(source.state_dict())

    for i, layer in enumerate(deep.gpt_neox.layers):
        copy(shallow.gpt_neox.layers[i % n], layer)
    copy(shallow.gpt_neox.embed_in, deep.gpt_neox.embed_in)
    copy(shallow.gpt_neox.final_layer_norm, deep.gpt_neox.final_layer_norm)
    copy(shallow.get_output_embeddings(), deep.get_output_embeddings())
