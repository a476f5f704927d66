"""How many tokens a language model reads at once, from its config and its modules."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

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


def context_of(text: Any) -> int | None:
    """Return the most tokens of an input by a model's config; None if there is no limit.

    Scaled rotary angles have none: some configs name the limit before the scaling, others after.
    """
    relative = (
        any(getattr(text, key, None) for key in RELATIVE)
        or getattr(text, "model_type", None) == "bloom"
    )
    rope = getattr(text, "rope_parameters", None) or {}  # for each type of layer, or for all
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, Mapping)}
    if relative or kinds - {"default", None}:
        return None
    spelled = (getattr(text, key, None) for key in CONTEXTS)
    return next((n for n in spelled if isinstance(n, int) and n > 0), None)


def within_positions(context: int | None, model: nn.Module, blocks: nn.Module) -> int | None:
    """Return a context that is no longer than the learned position embeddings.

    Some of them keep places for other things at the start. One belongs to the padding token, and
    positions begin after it: RoBERTa has 514, of which 512 can be used. OPT and BART leave out an
    `offset`.
    """
    limits = [] if context is None else [context]
    for table in _position_tables(_text_part(model, blocks)):
        padding, offset = table.padding_idx, getattr(table, "offset", 0)
        limits.append(table.num_embeddings - (offset if padding is None else padding + 1))
    return min(limits, default=None)


def _position_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and re.search("wpe|pos", name) and "rel" not in name:
            yield module


def _text_part(model: nn.Module, blocks: nn.Module) -> nn.Module:
    """Return the smallest module with the blocks and the token embeddings: no vision tower."""
    try:
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # a model's own code does not name them
        return model
    holding = [m for m in model.modules() if {blocks, embeddings} <= set(m.modules())]
    return holding[-1]  # parents come before their children
