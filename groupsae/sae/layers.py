"""What an SAE has of its own for each layer of its group: biases, and low-rank maps around it.

With x a row of layer l, times its norm factor, and I the identity,

    h = (x - b_dec_l)(I + A_l B_l),  z = sigma(h W_enc^T + b_enc_l),
    x_hat = (z W_dec)(I + C_l D_l) + b_dec_l,

where b_dec_l is the bias that the layers share plus an offset of the layer's own, as is b_enc_l.
On layer l this is a plain SAE with other weights, `SAE.at(l)`. A training batch is sorted by
layer, so that a map is one product for all rows of its layer; `sizes` are the rows of each layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from groupsae.sae.kernels.dense import rows_of
from groupsae.sae.sparse import Entries

BIASES = ("shared", "per_layer")
Sizes = Sequence[int]


class Own(NamedTuple):
    """What one layer has of its own; None where it has none."""

    b_dec: Float[Tensor, "d_model"] | None
    b_enc: Float[Tensor, "d_sae"] | None
    A: Float[Tensor, "d_model rank"] | None
    B: Float[Tensor, "rank d_model"] | None
    C: Float[Tensor, "d_model rank"] | None
    D: Float[Tensor, "rank d_model"] | None


class LayerMaps(nn.Module):
    """Offsets of the biases and low-rank maps, for each layer of a group.

    At the start they change nothing: the offsets, B and D are zero. A and C are random, with
    variance 1 / d_model. The parameters are those of `Own`, with a first dimension for the layers.

    Args:
        layers: the group, sorted.
        d_model: width of the residual stream.
        d_sae: number of latents.
        own_biases: whether each layer has its own biases.
        rank: inner width of the maps; 0: there are none.
        generator: random generator for A and C; None: torch's default.
    """

    b_dec: Tensor | None
    b_enc: Tensor | None
    A: Tensor | None
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None

    def __init__(
        self,
        *,
        layers: Sequence[int],
        d_model: int,
        d_sae: int,
        own_biases: bool,
        rank: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.layers, self.rank, count = list(layers), rank, len(layers)
        device = generator.device if generator else torch.get_default_device()  # as of the SAE
        for name, width in {"b_dec": d_model, "b_enc": d_sae}.items():
            offsets = nn.Parameter(torch.zeros(count, width)) if own_biases else None
            self.register_parameter(name, offsets)
        for first, second in ("AB", "CD"):
            drawn = torch.randn(count, d_model, rank, generator=generator, device=device)
            drawn = drawn.to(torch.get_default_device()) / d_model**0.5
            zeros = torch.zeros(count, rank, d_model)
            self.register_parameter(first, nn.Parameter(drawn) if rank else None)
            self.register_parameter(second, nn.Parameter(zeros) if rank else None)

    def extra_repr(self) -> str:
        """Return the layers and what each has of its own."""
        return f"layers={self.layers}, own_biases={self.b_dec is not None}, rank={self.rank}"

    def of(self, layer: int) -> Own:
        """Return what a layer has of its own."""
        place = self.layers.index(layer)
        every = (getattr(self, name) for name in Own._fields)
        return Own(*(None if each is None else each[place] for each in every))

    # ---- a training batch, sorted by layer ----------------------------------------------------

    def enter(
        self, x: Float[Tensor, "row d_model"], sizes: Sizes, b_dec: Float[Tensor, "d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """Return h + b_dec, from which the encoder subtracts the shared bias b_dec.

        The own offset of b_dec gets most of its gradient in `offsets`: here it would take a
        product for each row.
        """
        own = None if self.b_dec is None else _each_row(self.b_dec, sizes)
        h = x if own is None else x - own.detach()
        if self.A is None or self.B is None:
            return h
        centred = x - b_dec if own is None else x - own - b_dec
        return h + _low_rank(centred, self.A, self.B, sizes)

    def offsets(
        self, W_enc: Float[Tensor, "latent d_model"], latents: Int[Tensor, "latent"] | None
    ) -> Float[Tensor, "layer latent"]:
        """Return the layers' offsets of the pre-activations of these latents; None: of all.

        Their values are b_enc's. They also carry the gradient of the b_dec that `enter` subtracts.
        """
        assert self.b_dec is not None
        assert self.b_enc is not None
        b_enc = self.b_enc if latents is None else self.b_enc[:, latents]
        weights, zeros = W_enc.detach(), self.b_dec - self.b_dec.detach()
        return b_enc - torch.stack([weights @ zero for zero in zeros])

    def shift(
        self, pre_acts: Float[Tensor, "row d_sae"], sizes: Sizes, W_enc: Float[Tensor, "d_sae d"]
    ) -> Float[Tensor, "row d_sae"]:
        """Return pre-activations with their layers' offsets; in place without gradients."""
        if self.b_enc is None:
            return pre_acts
        if torch.is_grad_enabled():
            return pre_acts + _each_row(self.offsets(W_enc, None), sizes)
        for rows, offset in zip(pre_acts.split(list(sizes)), self.b_enc, strict=True):
            rows += offset
        return pre_acts

    def shift_entries(
        self,
        z: Float[Tensor, "entry"],
        entries: Entries,
        sizes: Sizes,
        W_enc: Float[Tensor, "latent d"],
        *,
        latents: Int[Tensor, "latent"] | None = None,
        known: bool,
    ) -> Float[Tensor, "entry"]:
        """Return pre-activations of entries with their layers' offsets.

        `known`: z has them already, and lacks the gradient.
        """
        if self.b_enc is None:
            return z
        offsets = self.offsets(W_enc, latents)
        numbers = torch.arange(len(sizes), device=z.device).unsqueeze(1)
        layers = _each_row(numbers, sizes).squeeze(1)[rows_of(entries.starts, len(z))]
        # not index_select: on a GPU its gradient adds up in any order
        found = offsets.flatten()[layers * offsets.shape[1] + entries.latents]
        return z + (found - found.detach() if known else found)

    def leave(
        self,
        y: Float[Tensor, "row *prefix d_model"],
        sizes: Sizes,
        *,
        bias: bool = True,
        frozen: bool = False,
    ) -> Float[Tensor, "row *prefix d_model"]:
        """Return y (I + C D), with the offset of b_dec if `bias`; `frozen`: only y is trained."""
        b_dec, first, second = (
            each.detach() if frozen and each is not None else each
            for each in (self.b_dec, self.C, self.D)
        )
        if first is not None and second is not None:
            y = y + _low_rank(y, first, second, sizes)
        if bias and b_dec is not None:
            own = _each_row(b_dec, sizes)
            y = y + own.view(len(own), *[1] * (y.ndim - 2), -1)
        return y


def _each_row(table: Shaped[Tensor, "layer width"], sizes: Sizes) -> Shaped[Tensor, "row width"]:
    """Return the line of each row's layer."""
    return torch.cat([line.expand(size, -1) for line, size in zip(table, sizes, strict=True)])


def _low_rank(
    x: Float[Tensor, "row *prefix d_model"],
    first: Float[Tensor, "layer d_model rank"],
    second: Float[Tensor, "layer rank d_model"],
    sizes: Sizes,
) -> Float[Tensor, "row *prefix d_model"]:
    """Return the rows of each layer times its two factors."""
    parts = zip(x.split(list(sizes)), first, second, strict=True)
    return torch.cat([rows @ down @ up for rows, down, up in parts])
