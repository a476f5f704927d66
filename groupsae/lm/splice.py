"""Put something else in the place of a layer's residual stream and see what the model says.

A forward pass whose residual is replaced after block l repeats blocks 0 to l for nothing. Here
they are computed once per batch; every replacement then costs only the blocks after l, the final
norm and the head. The result is that of a full forward with a hook, bit for bit on the same
device: the same modules run on the same numbers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groupsae.errors import UserError
from groupsae.lm.blocks import run_blocks


class Splicer:
    """Run a model cleanly once, then again and again from the middle with other residuals.

    `clean` reads a batch of tokens; `resume` and `together` run the same tokens with residuals
    replaced. The residual is `resid_post`, the raw output of a block.

    While the model resumes, blocks 0 to `layer` are stood in for: they hand on the given residual
    and, if blocks also return other things, what they returned in the clean run. Embeddings, mask
    and rotary angles are the model's own work and do run (they are cheap, and how they are made
    differs from model to model). The first time that `clean` reads a layer it makes sure, on the
    first sequence, that resuming from there with the clean residual gives the clean logits.

    Args:
        model: a causal language model with its head, frozen and in eval mode.
        blocks: its transformer blocks.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self.model, self.blocks = model, blocks
        self._tokens: Tensor | None = None
        self._beside: list[tuple[Any, ...] | None] = []
        self._dtype = torch.float32
        self._checked: set[int] = set()

    @torch.no_grad()
    def clean(
        self, tokens: Int[Tensor, "block pos"], layers: Iterable[int]
    ) -> tuple[Float[Tensor, "block pos vocab"], dict[int, Float[Tensor, "block pos d_model"]]]:
        """Return the logits of the model as it is and the residuals after `layers`.

        Both are in the model's dtype, on its device. The residuals are the model's own tensors:
        do not write into them.

        Raises:
            UserError: the model's logits are not finite, or it cannot be resumed from its blocks.
        """
        wanted = sorted(set(layers))
        if not self._checked.issuperset(wanted):
            self._check(tokens[:1], wanted)
        return self._clean(tokens, wanted)

    @torch.no_grad()
    def resume(
        self, layer: int, residual: Float[Tensor, "block pos d_model"]
    ) -> Float[Tensor, "block pos vocab"]:
        """Return the logits for the tokens of the last `clean`, with this residual after `layer`.

        Only the blocks after `layer` are computed. The residual is cast to the model's dtype.
        """
        residual = residual.to(self._dtype).contiguous()
        with self._standing_in(layer, residual):
            return self.model(input_ids=self._last_tokens(), use_cache=False).logits

    @torch.no_grad()
    def together(
        self, replace: Callable[[int, Tensor], Tensor], layers: Iterable[int]
    ) -> Float[Tensor, "block pos vocab"]:
        """Return the logits for the tokens of the last `clean`, all `layers` replaced at once.

        `replace(layer, residual)` gets the residual as it comes out of the block, thus after all
        replacements before it, and returns the one to go on with, [block, pos, d_model]; it is
        cast to the model's dtype.
        """

        def visit(layer: int, residual: Tensor) -> Tensor:
            return replace(layer, residual).to(residual.dtype)

        tokens = self._last_tokens()
        return run_blocks(self.model, self.blocks, layers, visit, False, input_ids=tokens).logits

    def _last_tokens(self) -> Tensor:
        if self._tokens is None:
            raise RuntimeError("call clean() first: it says which tokens to run")
        return self._tokens

    def _clean(self, tokens: Tensor, layers: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
        beside: list[tuple[Any, ...] | None] = []
        residuals: dict[int, Tensor] = {}

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            residual = output if isinstance(output, Tensor) else output[0]
            if len(beside) in layers:
                residuals[len(beside)] = residual
            self._dtype = residual.dtype
            beside.append(None if isinstance(output, Tensor) else tuple(output[1:]))

        self._tokens = None  # nothing to resume if this run fails
        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        self._tokens, self._beside = tokens, beside
        return logits, residuals

    @contextmanager
    def _standing_in(self, layer: int, residual: Tensor) -> Iterator[None]:
        """Let blocks 0 to `layer` return the residual (and what else they returned)."""

        def stand_in(beside: tuple[Any, ...] | None) -> Callable[..., Any]:
            output = residual if beside is None else (residual, *beside)
            return lambda *_args, **_kwargs: output

        # Found on the instance before the method of the class: the block itself, with its
        # attributes and hooks, stays in place, for models look at both.
        before = [vars(block).get("forward") for block in self.blocks[: layer + 1]]
        try:
            for block, beside in zip(self.blocks[: layer + 1], self._beside, strict=False):
                vars(block)["forward"] = stand_in(beside)
            yield
        finally:
            for block, forward in zip(self.blocks[: layer + 1], before, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    vars(block)["forward"] = forward

    def _check(self, tokens: Tensor, layers: list[int]) -> None:
        """See that the clean residual of each layer leads to the clean logits.

        The two agree bit for bit where kernels are deterministic; the tolerance, relative to the
        largest logit, is two steps of the dtype, at least 1e-4.
        """
        name = type(self.model).__name__
        logits, residuals = self._clean(tokens, layers)
        if not logits.isfinite().all():
            raise UserError(
                f"{name} gives logits that are not finite in {logits.dtype}; "
                "use model.dtype=float32 or bfloat16."
            )
        largest = logits.abs().max()
        for layer in layers:
            try:
                off = float((self.resume(layer, residuals[layer]) - logits).abs().max() / largest)
                found = f"changes the logits by {off:.1g} of the largest"
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                off, found = math.inf, f"ends in {type(error).__name__} ({error})"
            if not off <= max(1e-4, 2 * torch.finfo(logits.dtype).eps):
                raise UserError(
                    f"{name} cannot be run from the middle: going on after block {layer} with "
                    f"its own residual {found}. Its blocks pass on more than the residual "
                    "stream, so the effect of its SAEs cannot be measured."
                )
            self._checked.add(layer)
