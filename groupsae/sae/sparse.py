"""The encoder and the decoder at the active latents only, with gradients.

An SAE with k of n latents active needs one dense product, the encoder's, to find them. Their
gradients and the decoder touch k rows a token. With E entries (active latents of all tokens),
z_e = W_enc[j_e] . (x[r_e] - b_dec) + b_enc[j_e] and y_r = sum_{e in row r} a_e W_dec[j_e],

    dL/da_e = dL/dy[r_e] . W_dec[j_e]
    dL/dW_dec[j] = sum_{e: j_e = j} a_e dL/dy[r_e]
    dL/dW_enc[j] = sum_{e: j_e = j} dL/dz_e (x[r_e] - b_dec)
    dL/db_enc[j] = sum_{e: j_e = j} dL/dz_e,   dL/db_dec = -W_enc^T dL/db_enc

Both weights' gradients are sums over the entries in order of latents, `Entries.by_latent`, of the
same form as decoding, which is a sum over them in order of rows. No tensor of size
[entry, d_model] or [batch, d_sae] is made here.
"""

from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupsae.sae.kernels.dense import rows_of
from groupsae.sae.kernels.dispatch import kernels_for


class ByLatent(NamedTuple):
    """Entries sorted by latent."""

    order: Int[Tensor, "entry"]  # their numbers in order of rows
    rows: Int[Tensor, "entry"]  # the row of each
    starts: Int[Tensor, "bound"]  # where each latent's entries begin, and their number at the end


class Entries:
    """Which latents are active in which rows.

    Args:
        latents: the latent of each entry, in order of rows.
        starts: where each row's entries begin, and their number at the end.
        d_sae: number of latents.
    """

    def __init__(
        self, latents: Int[Tensor, "entry"], starts: Int[Tensor, "bound"], d_sae: int
    ) -> None:
        self.latents, self.starts, self.d_sae = latents, starts, d_sae

    @classmethod
    def of_rows(cls, latents: Int[Tensor, "row k"], d_sae: int) -> "Entries":
        """Return the entries of rows that all have k."""
        rows, k = latents.shape
        starts = torch.arange(rows + 1, device=latents.device) * k
        return cls(latents.flatten(), starts, d_sae)

    def with_rows(self, starts: Int[Tensor, "bound"]) -> "Entries":
        """Return the same entries in other rows; they need not be sorted again."""
        entries = Entries(self.latents, starts, self.d_sae)
        entries._sorted = self._sorted
        return entries

    @cached_property
    def _sorted(self) -> tuple[Int[Tensor, "entry"], Int[Tensor, "bound"]]:
        latents, order = self.latents.int().sort(stable=True)  # int: half the time of int64
        every = torch.arange(self.d_sae + 1, device=latents.device, dtype=latents.dtype)
        return order, torch.searchsorted(latents, every)

    @cached_property
    def by_latent(self) -> ByLatent:
        """Return the entries sorted by latent, for the sums of both weights' gradients."""
        order, starts = self._sorted
        return ByLatent(order, rows_of(self.starts, len(order))[order], starts)

    def kernels(self, table: Tensor) -> ModuleType:
        """Return the kernels for these entries."""
        return kernels_for(table, len(self.latents), len(self.starts) - 1)


class Decode(torch.autograd.Function):
    """The decoder at the active latents, without the bias: [row, d_model]."""

    @staticmethod
    def forward(
        ctx: Any, acts: Float[Tensor, "entry"], W_dec: Float[Tensor, "n d"], entries: Entries
    ) -> Float[Tensor, "row d"]:
        """Return the sum of acts times decoder rows over each row's entries."""
        ctx.save_for_backward(acts, W_dec)
        ctx.entries = entries
        return entries.kernels(W_dec).combine(acts, entries.latents, entries.starts, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "row d"]) -> tuple[Tensor | None, ...]:
        """Return the gradients of acts and W_dec."""
        (acts, W_dec), entries = ctx.saved_tensors, ctx.entries
        kernels, grad = entries.kernels(W_dec), grad.contiguous()
        grad_acts = grad_dec = None
        if ctx.needs_input_grad[0]:
            grad_acts = kernels.dots(grad, W_dec, entries.starts, entries.latents)
        if ctx.needs_input_grad[1]:
            order, rows, starts = entries.by_latent
            grad_dec = kernels.combine(acts[order], rows, starts, grad)
        return grad_acts, grad_dec, None


class Encode(torch.autograd.Function):
    """Pre-activations of the active latents: [entry]."""

    @staticmethod
    def forward(
        ctx: Any,
        known: Float[Tensor, "entry"] | None,
        x: Float[Tensor, "row d"],
        W_enc: Float[Tensor, "n d"],
        b_enc: Float[Tensor, "n"],
        b_dec: Float[Tensor, "d"],
        entries: Entries,
    ) -> Float[Tensor, "entry"]:
        """Return W_enc[j] . (x - b_dec) + b_enc[j] of each entry, or the `known` values."""
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.entries = entries
        if known is not None:
            return known.clone()
        kernels = entries.kernels(W_enc)
        return (
            kernels.dots(x - b_dec, W_enc, entries.starts, entries.latents)
            + b_enc[entries.latents]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "entry"]) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the encoder and both biases."""
        (x, W_enc, b_dec), entries = ctx.saved_tensors, ctx.entries
        kernels = entries.kernels(W_enc)
        if not any(ctx.needs_input_grad[2:5]):
            grad_x = kernels.combine(grad, entries.latents, entries.starts, W_enc)
            return None, grad_x, None, None, None, None
        order, rows, starts = entries.by_latent
        sorted_grad = grad[order]
        grad_enc = kernels.combine(sorted_grad, rows, starts, x - b_dec)
        grad_bias = torch.segment_reduce(sorted_grad, "sum", offsets=starts, initial=0)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = kernels.combine(grad, entries.latents, entries.starts, W_enc)
        return None, grad_x, grad_enc, grad_bias, -(W_enc.T @ grad_bias), None
