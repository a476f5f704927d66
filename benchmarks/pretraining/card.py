# ruff: noqa: E501 - lines of a Markdown table cannot be broken
"""The card that travels with a model pretrained here."""

from collections.abc import Mapping
from typing import Any

CARD = """---
license: mit
library_name: transformers
tags: [gpt_neox, python, groupsae]
---
# {name}: a small GPT-NeoX trained on Python source

The bundled language model of `groupsae`: the Pythia architecture (`GPTNeoXForCausalLM`) with
{num_layers} layers, d_model {d_model}, {num_heads} heads, context {context} and a byte-level BPE
of {vocab_size:,} tokens that was learnt on the same corpus. It exists so that training sparse
autoencoders can be tried without a download; it writes plausible Python and knows nothing else.

| | |
|---|---|
| corpus | {corpus} |
| training tokens | {train_tokens:,} |
| held-out loss | **{heldout_nats_per_token:.3f} nats per token** = {heldout_bits_per_byte:.3f} bits per byte, on {heldout_tokens:,} tokens of files never trained on (chosen by a hash of the path) |
| stored as | bf16 safetensors |
| hardware | {hardware} |
| date | {date} |

## How it was trained

AdamW {betas}, peak learning rate {lr:g} in the last run, {warmup_steps} steps of warm-up, linear decay to zero, weight
decay {weight_decay:g}, gradient norm clipped at 1, {tokens_per_step:,} tokens a step, float32.

{commands}

Held-out loss in nats per token while training, on the same {eval_tokens:,} held-out tokens each
time (the figure above is over more of them):

| layers | tokens | held-out loss |
|---|---|---|
{history}

The loss went from {first:.3f} to {last:.3f} in the last run and was {trend}: the run ended because
its token budget and the learning rate's decay did. {notes}
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the model card in Markdown."""
    history = "\n".join(
        f"| {stage['num_layers']} | {tokens:,} | {loss:.3f} |"
        for stage in facts["stages"]
        for tokens, loss in stage["heldout_history"]
    )
    commands = "\n".join(f"    {stage['command']}" for stage in facts["stages"])
    losses = [loss for _, loss in facts["stages"][-1]["heldout_history"]]
    trend = "still falling at its end" if losses[-1] < losses[-2] else "no longer falling"
    return CARD.format(
        **{
            **facts,
            "history": history,
            "commands": commands,
            "first": losses[0],
            "last": losses[-1],
            "trend": trend,
            "notes": " ".join(stage["notes"] for stage in facts["stages"] if "notes" in stage),
        }
    )
