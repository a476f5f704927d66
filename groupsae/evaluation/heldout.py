"""One pass over held-out text: every SAE on every layer it serves, and spliced into the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.cost.counter import flop_counter
from groupsae.data.filters import TokenFilter, both
from groupsae.evaluation.effect import CleanPredictions, EffectSums
from groupsae.evaluation.reconstruction import LayerSums, PerSequence, ReconstructionSums
from groupsae.evaluation.similarity import Firings
from groupsae.grouping.groupings import Grouping
from groupsae.lm.hooked import HookedLM
from groupsae.lm.splice import Splicer
from groupsae.sae.base import SparseLatents
from groupsae.suite.suite import Suite

Pair = tuple[str, int]  # name of an SAE, and a layer it serves


@dataclass
class LayerEffects:
    """What taking a layer's activations away does to the model: the scale of every score."""

    sums: LayerSums
    zero: EffectSums = field(default_factory=EffectSums)
    mean: EffectSums = field(default_factory=EffectSums)


@dataclass
class PairSums:
    """One SAE on one of its layers."""

    reconstruction: ReconstructionSums
    effect: EffectSums = field(default_factory=EffectSums)


class HeldoutSums:
    """Everything that the pass adds up, per sequence.

    Args:
        saes: name -> that SAE alone.
        groupings: the ways to serve all layers with them.
        together: also splice all layers of each grouping at once.
        similarity_tokens: tokens on which firings are compared with those of per-layer SAEs.
    """

    def __init__(
        self,
        saes: dict[str, Suite],
        groupings: list[Grouping],
        together: bool,
        similarity_tokens: int,
    ) -> None:
        self.saes, self.groupings = saes, groupings
        d_model = next(iter(saes.values())).d_model
        self.tokens = 0  # that counted, however extreme on some layer
        self.clean_ce, self.predictions = PerSequence(), PerSequence()
        self.layers = {
            layer: LayerEffects(LayerSums(d_model))
            for layer in sorted({x for suite in saes.values() for x in suite.layers})
        }
        self.pairs = {
            (name, layer): PairSums(ReconstructionSums(d_model, suite.saes[name].d_sae))
            for name, suite in saes.items()
            for layer in suite.layers
        }
        self.together = {g.name: EffectSums() for g in groupings} if together else {}
        self.similarity_left = similarity_tokens
        self.firings = {p: Firings(saes[p[0]].saes[p[0]].d_sae) for p in self._compared()}

    def _compared(self) -> list[Pair]:
        """Return per-layer SAEs, and the groups on the layers where one stands beside them."""
        baseline = next((g for g in self.groupings if g.kind == "per_layer"), None)
        if baseline is None:
            return []
        grouped = {
            (name, layer)
            for g in self.groupings
            if g.kind == "groups"
            for layer, name in g.sae_of_layer.items()
        }
        return sorted(grouped | {(n, layer) for layer, n in baseline.sae_of_layer.items()})

    def update(
        self,
        tokens: Int[Tensor, "block pos"],
        splicer: Splicer,
        means: Float[Tensor, "layer d_model"],
        filters: TokenFilter,
    ) -> None:
        """Add some sequences.

        Positions that the filters leave out keep their own activation when spliced. What is
        predicted at them is not counted, but for those that are left out on one layer only, for
        their norm there: every layer is judged on the same predictions. A model without
        next-token predictions adds none.

        Args:
            tokens: of the sequences.
            splicer: of the model, with its head if it has one.
            means: mean activation of each layer, for mean ablation.
            filters: positions that count.
        """
        logits, acts = splicer.clean(tokens, self.layers)
        read = splicer.lm.read(tokens)
        counted = filters.tokens(read)
        self.tokens += tokens.numel() if counted is None else int(counted.sum())
        clean = None if logits is None else CleanPredictions(logits, read, counted)
        nothing = torch.zeros(len(tokens), dtype=torch.float64)
        self.clean_ce.append(nothing if clean is None else clean.ce)
        self.predictions.append(nothing if clean is None else clean.predictions)

        for layer, effects in self.layers.items():
            original, x = acts[layer], acts[layer].float()
            keep = both(counted, filters.activations(x))

            def splice(
                x_hat: Tensor,
                into: EffectSums,
                layer: int = layer,
                original: Tensor = original,
                keep: Tensor | None = keep,
            ) -> None:
                if clean is None:
                    into.update(nothing, nothing)
                else:
                    changed = splicer.resume(layer, _where(keep, x_hat, original))
                    into.update(*clean.compare(changed))

            effects.sums.update(x, keep)
            splice(torch.zeros_like(x), effects.zero)
            splice(means[layer].expand_as(x), effects.mean)
            for (name, where), sums in self.pairs.items():
                if where != layer:
                    continue
                latents, x_hat = _reconstruct(self.saes[name], x, layer)
                sums.reconstruction.update(x, x_hat, latents, keep)
                splice(x_hat, sums.effect)
                if self.similarity_left > 0 and (name, layer) in self.firings:
                    flat = None if keep is None else keep.flatten()
                    self.firings[name, layer].update(latents, flat)
        self.similarity_left -= tokens.numel()
        if clean is None:
            return
        for grouping in self.groupings if self.together else []:
            owner = grouping.sae_of_layer

            def replace(layer: int, found: Tensor, owner: dict[int, str] = owner) -> Tensor:
                x = found.float()
                x_hat = _reconstruct(self.saes[owner[layer]], x, layer)[1]
                return _where(both(counted, filters.activations(x)), x_hat, found)

            changed = splicer.together(replace, owner)
            self.together[grouping.name].update(*clean.compare(changed))


@torch.no_grad()
def run_heldout(
    sums: HeldoutSums,
    parts: Iterator[Int[Tensor, "block pos"]],
    lm: HookedLM,
    means: Float[Tensor, "layer d_model"],
    filters: TokenFilter,
    advance: Callable[[int], object],
) -> int:
    """Add all parts to the sums; return the measured FLOPs, those of the first part scaled up.

    Args:
        sums: to add to.
        parts: held-out tokens, a forward's worth each, all but the last equally many.
        lm: the language model, with its head if it has one.
        means: mean activation of each layer.
        filters: positions that count.
        advance: told the tokens of each part when it is done.
    """
    splicer = Splicer(lm)
    flops = per_token = 0.0
    for tokens in parts:
        if not per_token:
            splicer.clean(tokens[:1], sums.layers)  # it checks itself now: not once for each part
            with flop_counter() as counter:
                sums.update(tokens, splicer, means, filters)
            per_token = counter.get_total_flops() / tokens.numel()
        else:
            sums.update(tokens, splicer, means, filters)
        flops += per_token * tokens.numel()
        advance(tokens.numel())
    return round(flops)


def _reconstruct(suite: Suite, x: Tensor, layer: int) -> tuple[SparseLatents, Tensor]:
    latents = suite.encode_sparse(x.flatten(0, 1), layer)
    return latents, suite.decode_sparse(latents, layer).view_as(x)


def _where(keep: Tensor | None, replaced: Tensor, original: Tensor) -> Tensor:
    if keep is None:
        return replaced
    return torch.where(keep.unsqueeze(-1), replaced.to(original.dtype), original)
