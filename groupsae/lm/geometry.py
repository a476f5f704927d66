"""Stacks of blocks and sizes of a language model, from its config and its empty modules."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from groupsae.runtime.errors import UserError

STACKS = ("encoder", "decoder")
# The most tokens of an input, as configs spell it; the first one that is there counts.
CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
)
# Positions are distances between tokens: ALiBi (Falcon), and relative biases (DeBERTa, T5).
RELATIVE = ("alibi", "relative_attention", "relative_attention_num_buckets")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a language model, or of one of its two stacks."""

    num_layers: int
    d_model: int
    context: int | None  # most tokens in one input; None: there is no limit
    vocab_size: int


def stacks_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the stacks of a model: encoder and decoder (T5), or one of them.

    A model with one stack is a `decoder` if it predicts the next token (GPT-2), otherwise an
    `encoder` (BERT, unless its config has `is_decoder`).
    """
    if getattr(config, "is_encoder_decoder", False):
        return STACKS
    kind = config.model_type
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    causal = (
        kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    )
    return ("decoder",) if causal and not masked else ("encoder",)


def choose_stack(config: PreTrainedConfig, stack: str | None, name: str) -> str:
    """Return the stack to read.

    Raises:
        UserError: the model has two stacks and none is named, or it lacks the named one.
    """
    there = stacks_of(config)
    if stack is None and len(there) > 1:
        raise UserError(
            f"{name} has an encoder and a decoder: choose one with model.stack=encoder or "
            "model.stack=decoder."
        )
    if stack is not None and stack not in there:
        if stack not in STACKS:
            raise UserError(f"model.stack is '{stack}'; use encoder, decoder or null.")
        raise UserError(
            f"model.stack is '{stack}', but {name} has only a stack of type {there[0]}: use "
            "model.stack=null."
        )
    return stack or there[0]


def geometry_of(config: PreTrainedConfig, stack: str, name: str) -> Geometry:
    """Return the sizes of a stack; of a multimodal model, those of its text part.

    Raises:
        UserError: the config lacks one of them.
    """
    part: Any = getattr(config, stack, None) if len(stacks_of(config)) > 1 else None
    if isinstance(part, PreTrainedConfig):  # each stack has its own config (T5Gemma)
        text, depths = part.get_text_config(), ["num_hidden_layers"]
    elif len(stacks_of(config)) > 1:
        text = config
        depths = [f"{stack}_layers", f"num_{stack}_layers", "num_layers", "num_hidden_layers"]
    else:
        text, depths = config.get_text_config(), ["num_hidden_layers"]
    found: dict[str, Any] = {
        "num_hidden_layers": next((d for key in depths if (d := getattr(text, key, None))), None),
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None),
    }
    missing = [key for key, value in found.items() if not isinstance(value, int)]
    if missing:
        raise UserError(
            f"model {name}: its config has no {' and no '.join(missing)}: choose a text model."
        )
    return Geometry(
        num_layers=found["num_hidden_layers"],
        d_model=found["hidden_size"],
        context=_context_of(text),
        vocab_size=found["vocab_size"],
    )


def _context_of(text: PreTrainedConfig) -> int | None:
    relative = any(getattr(text, key, None) for key in RELATIVE) or text.model_type == "bloom"
    spelled = (getattr(text, key, None) for key in CONTEXTS)
    return None if relative else next((n for n in spelled if isinstance(n, int) and n > 0), None)


def within_positions(geometry: Geometry, model: nn.Module, blocks: nn.Module) -> Geometry:
    """Return the sizes with a context no longer than the learned position embeddings.

    Some of them keep places for other things at the start. One belongs to the padding token, and
    positions begin after it: RoBERTa has 514, of which 512 can be used. OPT and BART leave out an
    `offset`.
    """
    limits = [] if geometry.context is None else [geometry.context]
    for table in _position_tables(_text_part(model, blocks)):
        padding, offset = table.padding_idx, getattr(table, "offset", 0)
        limits.append(table.num_embeddings - (offset if padding is None else padding + 1))
    return replace(geometry, context=min(limits, default=None))


def _position_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and re.search("wpe|pos", name) and "rel" not in name:
            yield module


def _text_part(model: nn.Module, blocks: nn.Module) -> nn.Module:
    """Return the smallest module with the blocks and the token embeddings: no vision tower."""
    try:
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # a model's own code does not name them
        return model
    holding = [m for m in model.modules() if {blocks, embeddings} <= set(m.modules())]
    return holding[-1]  # parents come before their children
