"""A loaded model whose activations are read, and replaced, at one hookpoint of every block."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from groupsae.lm.hookpoints import find_sites, with_positions

Visit = Callable[[int, Tensor], Tensor | None]


class _StopForward(Exception):
    """Raised by the last needed hook: nothing after it is computed."""


class HookedLM:
    """One stack of a model, run on blocks of tokens.

    Blocks are packed and hold no padding, so every position is attended to: a mask of ones is for
    models that would otherwise mask tokens with the id of the padding token.

    The decoder of an encoder-decoder model is teacher-forced: the encoder reads a block of tokens,
    the decoder the same block shifted right by one, after the model's start token.

    Args:
        model: the module to call: the complete model, or the encoder if that is the stack.
        blocks: the blocks of the stack.
        hookpoint: the activations to read of each block, one of `groupsae.lm.hookpoints`.
        submodule: path within a block, for attn_out and mlp_out; None searches for it.
        d_model: width of the activations.
        start_token: the decoder's first token in an encoder-decoder model; None for all others.
        predicts: True if the model gives next-token logits.

    Raises:
        UserError: the blocks lack the hookpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        *,
        hookpoint: str,
        submodule: str | None,
        d_model: int,
        start_token: int | None,
        predicts: bool,
    ) -> None:
        self.model, self.blocks, self.hookpoint = model, blocks, hookpoint
        self.sites = find_sites(blocks, hookpoint, submodule)
        self.d_model, self.start_token, self.predicts = d_model, start_token, predicts
        accepted = inspect.signature(model.forward).parameters
        self._accepted = accepted.keys() if "input_ids" in accepted else None  # it takes anything

    def read(self, tokens: Int[Tensor, "block pos"]) -> Int[Tensor, "block pos"]:
        """Return the token that the stack reads at each position."""
        return read_after(self.start_token, tokens)

    @torch.no_grad()
    def inputs(
        self, tokens: Int[Tensor, "block pos"], *, last_logits: bool = False
    ) -> dict[str, Any]:
        """Return the model's keyword arguments for these tokens.

        For an encoder-decoder model this runs the encoder, once for all forwards that follow.
        With `last_logits` a model that can do so computes the logits of the last position only.
        """
        ones = torch.ones_like(tokens)
        if self.start_token is None:
            given = {"input_ids": tokens, "attention_mask": ones, "use_cache": False}
        else:
            encoder: Any = self.model.get_encoder()  # type: ignore[operator]
            with nothing_padded():
                encoded = encoder(input_ids=tokens, attention_mask=ones)
            given = {
                "encoder_outputs": encoded,
                "attention_mask": ones,
                "decoder_input_ids": self.read(tokens),
                "decoder_attention_mask": ones,
                "use_cache": False,
            }
        if self._accepted is None:
            return given
        if last_logits:
            given["logits_to_keep"] = 1
        return {name: value for name, value in given.items() if name in self._accepted}

    def output(self, result: Any) -> Float[Tensor, "block pos output"]:
        """Return what a forward is judged by: logits, or without a head the last activations."""
        found: Tensor = result.logits if self.predicts else result.last_hidden_state
        return found

    def run(
        self,
        inputs: dict[str, Any],
        layers: Iterable[int],
        visit: Visit,
        stop: bool,
        grad: bool = False,
    ) -> Any:
        """Run the model once and pass the activations of `layers` to `visit`.

        `visit(layer, acts)` gets them in the model's dtype, [block, pos, d_model]; a tensor that
        it returns replaces them. (The last entry of Hugging Face's `hidden_states` is *after* the
        final norm, so hooks are the only way to the last layer.) Hooks are always removed.

        With `stop` the forward pass ends after the last of `layers`; then None is returned.
        With `grad` a graph is kept for gradients from where an activation requires them.

        Raises:
            UserError: a hookpoint's output is not [block, pos, d_model].
        """
        wanted = sorted(set(layers))
        shape = inputs["input_ids" if self.start_token is None else "decoder_input_ids"].shape

        def see(layer: int, acts: Tensor) -> Tensor | None:
            where = f"{self.hookpoint} of block {layer} of {type(self.model).__name__}"
            replaced = visit(layer, with_positions(acts, shape, self.d_model, where))
            if stop and layer == wanted[-1]:
                raise _StopForward
            if replaced is None:
                return None
            # some blocks write into the output of their halves (Falcon adds attention to the MLP)
            return replaced.reshape(acts.shape).clone()

        handles: list[RemovableHandle] = []
        try:
            for layer in wanted:
                handles.append(self.sites[layer].watch(partial(see, layer)))
            with nothing_padded(), torch.set_grad_enabled(grad):
                return self.model(**inputs)
        except _StopForward:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def acts(
        self, tokens: Int[Tensor, "block pos"], layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "block pos d_model"]]:
        """Return the activations of `layers`, in the model's dtype; nothing after them is run."""
        found: dict[int, Tensor] = {}
        self.run(self.inputs(tokens), layers, copy_into(found), stop=True)
        return found


def copy_into(acts: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    """Return a visitor that copies activations; the model may write into them later."""

    def visit(layer: int, found: Tensor) -> None:
        acts[layer] = found.clone()

    return visit


def read_after(
    start_token: int | None, tokens: Int[Tensor, "block pos"]
) -> Int[Tensor, "block pos"]:
    """Return the token that is read at each position: with a start token, the one before it."""
    if start_token is None:
        return tokens
    start = torch.full_like(tokens[:, :1], start_token)
    return torch.cat([start, tokens[:, :-1]], dim=1)


@contextmanager
def nothing_padded() -> Iterator[None]:
    """Let transformers skip the attention mask, in this process, while inside.

    Given a mask of ones it uses the faster kernel without a mask, but to see that they are ones it
    sums them on the device and waits for the sum, in every forward. Given no mask it compares
    positions, and waits too; some models would then search for padding tokens. So the functions
    that make masks get None, whatever the model passes.
    """
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(masks)
    for name, make in before.items():
        masks[name] = partial(_unpadded, make)
    try:
        yield
    finally:
        for name, make in before.items():
            del masks[name]  # shows the function registered below, if any
            if masks.get(name) is not make:
                masks[name] = make


def _unpadded(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return make(*args, **{**kwargs, "attention_mask": None})
