"""Replace a layer's activations and compute the model's output.

The output is the logits; of a model without a head (an encoder) its last activations.

A full forward pass for each replaced layer would repeat the blocks before it. Here they run once
per batch; each replacement then costs only the blocks after it. The result equals a full forward
with a hook, bit for bit on the same device: the same modules run on the same numbers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.lm.hooked import HookedLM, copy_into
from groupsae.runtime.errors import UserError
from groupsae.runtime.memory import return_large_tensors


class Splicer:
    """Run a model once, then many times from the middle with other activations.

    `clean` runs a batch of tokens; `resume` and `together` run the same tokens with activations
    at the model's hookpoint replaced. From `resid_post` of a layer the model continues with the
    next block; from the other hookpoints with the layer's own block, whose input or half is
    replaced.

    When the model resumes, the blocks before are replaced by functions that return the residual
    stream and whatever else they returned in the clean run. Embeddings, mask and rotary angles are
    computed again (cheap, and different in each model); an encoder before the decoder is not. When
    `clean` runs a layer for the first time it checks, on the first sequence, that resuming from
    there with the clean activations gives the clean logits.

    Args:
        lm: a language model, with its head if it has one.
    """

    def __init__(self, lm: HookedLM) -> None:
        return_large_tensors()  # logits come and go, and small sums of them are kept
        self.lm = lm
        self._inputs: dict[str, Any] | None = None
        self._beside: list[tuple[Any, ...] | None] = []
        self._outputs: dict[int, Tensor] = {}  # of the blocks before those that are spliced
        self._dtype, self._tokens_on = torch.float32, torch.device("cpu")
        self._device: dict[int, torch.device] = {}  # of each layer, where a model is spread out
        self._checked: set[int] = set()

    @torch.no_grad()
    def clean(
        self, tokens: Int[Tensor, "block pos"], layers: Iterable[int]
    ) -> tuple[Float[Tensor, "block pos output"], dict[int, Float[Tensor, "block pos d_model"]]]:
        """Return the unchanged model's output and its activations.

        Both are in the model's dtype, on the device of the tokens.

        Raises:
            UserError: the output is not finite, or the model cannot be resumed from a block.
        """
        wanted = sorted(set(layers))
        if not self._checked.issuperset(wanted):
            self._check(tokens[:1], wanted)
        return self._clean(tokens, wanted)

    @torch.no_grad()
    def resume(
        self, layer: int, acts: Float[Tensor, "block pos d_model"]
    ) -> Float[Tensor, "block pos output"]:
        """Return the output for the tokens of the last `clean`, with these activations at `layer`.

        Only the blocks after them run. They are cast to the model's dtype.
        """
        inputs = self._last_inputs()
        acts = acts.to(self._device[layer], self._dtype).contiguous()
        if self.lm.hookpoint == "resid_post":
            with self._standing_in(layer + 1, acts):
                return self.lm.output(self.lm.model(**inputs)).to(self._tokens_on)
        with self._standing_in(layer, self._outputs.get(layer - 1)):
            result = self.lm.run(inputs, [layer], lambda *_: acts, stop=False)
        return self.lm.output(result).to(self._tokens_on)

    @torch.no_grad()
    def together(
        self, replace: Callable[[int, Tensor], Tensor], layers: Iterable[int]
    ) -> Float[Tensor, "block pos output"]:
        """Return the output for the tokens of the last `clean`, all `layers` replaced together.

        `replace(layer, acts)` gets the activations after all replacements in earlier layers and
        returns the new ones, [block, pos, d_model]; they are cast to the model's dtype.
        """
        inputs, here = self._last_inputs(), self._tokens_on

        def visit(layer: int, acts: Tensor) -> Tensor:
            return replace(layer, acts.to(here)).to(acts)

        return self.lm.output(self.lm.run(inputs, layers, visit, stop=False)).to(here)

    def _last_inputs(self) -> dict[str, Any]:
        if self._inputs is None:
            raise RuntimeError("call clean(tokens, layers) first")
        return self._inputs

    def _clean(self, tokens: Tensor, layers: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
        beside: list[tuple[Any, ...] | None] = []
        outputs: dict[int, Tensor] = {}
        acts: dict[int, Tensor] = {}

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if len(beside) + 1 in layers:
                outputs[len(beside)] = output if isinstance(output, Tensor) else output[0]
            beside.append(None if isinstance(output, Tensor) else tuple(output[1:]))

        self._inputs = None  # nothing to resume if this run fails
        inputs = self.lm.inputs(tokens)
        handles = [block.register_forward_hook(keep) for block in self.lm.blocks]
        try:
            output = self.lm.output(self.lm.run(inputs, layers, copy_into(acts), stop=False))
        finally:
            for handle in handles:
                handle.remove()
        self._inputs, self._beside, self._outputs = inputs, beside, outputs
        self._dtype, self._tokens_on = acts[layers[-1]].dtype, tokens.device
        self._device |= {layer: found.device for layer, found in acts.items()}
        moved = {layer: found.to(tokens.device) for layer, found in acts.items()}
        return output.to(tokens.device), moved

    @contextmanager
    def _standing_in(self, first: int, residual: Tensor | None) -> Iterator[None]:
        """Make the blocks before `first` return the residual (and their other outputs)."""

        def stand_in(beside: tuple[Any, ...] | None) -> Callable[..., Any]:
            output = residual if beside is None else (residual, *beside)
            return lambda *_args, **_kwargs: output

        # An attribute of the instance comes before the class's method, and the block keeps its
        # place, attributes and hooks, which models read.
        blocks = self.lm.blocks[:first]
        before = [vars(block).get("forward") for block in blocks]
        try:
            for block, beside in zip(blocks, self._beside, strict=False):
                vars(block)["forward"] = stand_in(beside)
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    vars(block)["forward"] = forward

    def _check(self, tokens: Tensor, layers: list[int]) -> None:
        """Check that the clean activations of each layer give the clean output.

        They agree bit for bit if kernels are deterministic; the tolerance, relative to the largest
        value, is two steps of the dtype, at least 1e-4.
        """
        name = type(self.lm.model).__name__
        output, acts = self._clean(tokens, layers)
        if not output.isfinite().all():
            kind = "logits" if self.lm.predicts else "activations"
            raise UserError(
                f"{name} gives {kind} that are not finite in {output.dtype}: use "
                "model.dtype=float32 or bfloat16."
            )
        largest = output.abs().max()
        for layer in layers:
            try:
                off = float((self.resume(layer, acts[layer]) - output).abs().max() / largest)
                found = f"changes the output by {off:.1g} of the largest"
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                off, found = math.inf, f"ends in {type(error).__name__} ({error})"
            if not off <= max(1e-4, 2 * torch.finfo(output.dtype).eps):
                raise UserError(
                    f"{name} cannot be resumed from the middle: from {self.lm.hookpoint} of block "
                    f"{layer}, resuming with its own activations {found}. Its blocks pass on more "
                    "than the residual stream, so the effect of its SAEs cannot be measured."
                )
            self._checked.add(layer)
