"""Where in a block activations are read: before it, after it, or the output of one half.

| hookpoint | activations, [block, pos, d_model] |
|---|---|
| `resid_post` | the residual stream after the block: its output |
| `resid_pre` | the residual stream before the block: its input |
| `attn_out` | what (self-)attention adds to the residual stream |
| `mlp_out` | what the MLP or the experts add to the residual stream |

In models that normalise before each half, resid_post = resid_pre + attn_out + mlp_out, whether the
halves run one after the other or in parallel (GPT-NeoX, GPT-J, Phi, Falcon, Cohere). (T5's decoder
also adds cross-attention, which belongs to neither.) If a norm follows each half (Gemma 2 and 3,
OLMo 2 and 3, GLM-4, Exaone 4), the two are the output of that norm, as in TransformerLens and
Gemma Scope; if a constant does (Granite's residual_multiplier, MiniCPM), they are the activations
before it. Models that normalise the sum (BERT, BART) add attn_out, normalise, add mlp_out,
normalise.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from groupsae.runtime.errors import UserError

HOOKPOINTS = ("resid_pre", "attn_out", "mlp_out", "resid_post")

# Paths within a block; the first that exists is taken. The first ones are inside a module that
# adds the residual (and normalises) itself.
HALVES = {
    "attn_out": (
        "attention.output.dense",  # BERT and its descendants
        "attention.attn",  # MPNet
        "layer.0.SelfAttention",  # T5
        "layer.0.LocalSelfAttention",  # LongT5
        "layer.0.TransientGlobalSelfAttention",
        "self_attention.dense",  # Bloom (and Falcon, with the same result)
        "self_attn", "self_attention", "attention", "attn", "linear_attn", "temporal_block",
        "multi_head_attention",
    ),
    "mlp_out": (
        "output.dense",
        "layer.2.DenseReluDense", "layer.1.DenseReluDense", "layer.2.mlp", "layer.1.mlp",
        "mlp.dense_4h_to_h",  # Bloom (and GPT-NeoX and Falcon)
        "ffn.down_proj",  # MPT
        "mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "mlp_block",
        "fc2",  # OPT, BART
    ),
}  # fmt: skip
# Norms after attention and MLP. (`post_attention_layernorm` alone is, in Llama and most others,
# the one *before* the MLP.)
NORMS_AFTER = (
    {"attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"},
    {"attn_out": "post_self_attn_layernorm", "mlp_out": "post_feedforward_layernorm"},
    {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    {"attn_out": "post_norm1", "mlp_out": "post_norm2"},  # HyperCLOVA X
    {
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_mlp_layernorm",
        "also": "pre_mlp_layernorm",  # AFMoE; without it the two normalise the sum (Nomic)
    },
)


@dataclass(frozen=True)
class Site:
    """A module of one block whose output, or input, is the hookpoint."""

    module: nn.Module
    before: bool  # read its input, not its output

    def watch(self, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Pass the activations of every forward to `see`; its result replaces them.

        If a module returns several things (attention weights, router scores), they are the first.
        """
        if self.before:
            return self.module.register_forward_pre_hook(_on_input(see), with_kwargs=True)

        def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return see(output)
            replaced = see(output[0])
            return None if replaced is None else (replaced, *output[1:])

        return self.module.register_forward_hook(on_output)


def _on_input(see: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            replaced = see(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        replaced = see(kwargs[name])
        return None if replaced is None else (args, {**kwargs, name: replaced})

    return on_input


def hookpoint_of(path: str) -> str | None:
    """Return the half of a block that a path within it is in; None if it is in neither."""
    for hookpoint, halves in HALVES.items():
        norms = [pair[hookpoint] for pair in NORMS_AFTER]
        if any(path == name or path.startswith(f"{name}.") for name in (*halves, *norms)):
            return hookpoint
    return None


def find_sites(blocks: Iterable[nn.Module], hookpoint: str, submodule: str | None) -> list[Site]:
    """Return the hookpoint's module of each block.

    Raises:
        UserError: a block has no such module; lists those that it has.
    """
    if hookpoint not in HOOKPOINTS:
        raise UserError(f"model.hookpoint is '{hookpoint}'; use {', '.join(HOOKPOINTS)}.")
    if hookpoint in ("resid_pre", "resid_post"):
        if submodule is not None:
            raise UserError(
                f"model.submodule is '{submodule}', but {hookpoint} is the block itself: leave "
                "it null, or use model.hookpoint=attn_out or mlp_out."
            )
        return [Site(block, before=hookpoint == "resid_pre") for block in blocks]
    return [
        Site(_half(block, number, hookpoint, submodule), before=False)
        for number, block in enumerate(blocks)
    ]


def paths_of(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Return the path of each site's module in the model without its head, by layer.

    For Pythia's `attn_out`: `layers.0.attention`, `layers.1.attention` and so on. A module outside
    the model without its head has its path in the complete model.
    """
    bare = getattr(model, "base_model", model)
    names = {module: name for each in (model, bare) for name, module in each.named_modules()}
    return [names[site.module] for site in sites]


def with_positions(
    acts: Tensor, shape: Sequence[int], d_model: int, where: str
) -> Float[Tensor, "batch pos d_model"]:
    """Return activations as [batch, pos, d_model], also where a module joins batch and pos.

    Args:
        acts: what a site shows.
        shape: batch and pos of the model's input.
        d_model: expected width.
        where: hookpoint, block and model, for the message.

    Raises:
        UserError: they have another shape.
    """
    expected = (*shape, d_model)
    if tuple(acts.shape) not in (expected, (math.prod(shape), d_model)):
        raise UserError(
            f"{where} has shape {list(acts.shape)} instead of {list(expected)}: use another "
            "model.hookpoint, or name the module with model.submodule."
        )
    return acts.view(expected)


def _half(block: nn.Module, number: int, hookpoint: str, submodule: str | None) -> nn.Module:
    inside = dict(block.named_modules())
    paths = HALVES[hookpoint] if submodule is None else (submodule,)
    found = next((path for path in paths if path in inside), None)
    if found is None:
        there = ", ".join(name for name in inside if name and name.count(".") < 2)
        lacks = f"no module for {hookpoint}" if submodule is None else f"no '{submodule}'"
        raise UserError(
            f"model.hookpoint is '{hookpoint}', but block {number} ({type(block).__name__}) has "
            f"{lacks}; it has: {there}. Name the module with model.submodule=<path within a "
            "block>, or use resid_post or resid_pre."
        )
    if submodule is None:
        for pair in NORMS_AFTER:
            if all(name in inside for name in pair.values()):
                return inside[pair[hookpoint]]
    return inside[found]
