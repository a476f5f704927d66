"""Stacks of blocks and sizes of a language model, from its config."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from groupsae.lm.context import context_of
from groupsae.runtime.errors import UserError

STACKS = ("encoder", "decoder")


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
        raise UserError(f"model.stack is '{stack}', but {name} has {' and '.join(there)}.")
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
        context=context_of(text),
        vocab_size=found["vocab_size"],
    )
