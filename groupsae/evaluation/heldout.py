"""One pass over held-out text: every SAE on every layer it serves, and spliced into the model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.cost.counter import flop_counter
from groupsae.data.filters import TokenFilter, both, replaced
from groupsae.evaluation.effect import CleanPredictions
from groupsae.evaluation.embeddings import RANKED, CleanEmbeddings
from groupsae.evaluation.reconstruction import LayerSums, ReconstructionSums, SequenceSums
from groupsae.evaluation.similarity import Firings
from groupsae.grouping.groupings import Grouping
from groupsae.lm.hooked import HookedLM
from groupsae.lm.splice import Splicer
from groupsae.sae.base import SparseLatents
from groupsae.suite.suite import Suite

Pair = tuple[str, int]  # name of an SAE, and a layer it serves


@dataclass
class LayerEffects:
    """A layer's activations, and the effects of their ablation: the scale of every score."""

    sums: LayerSums
    zero: SequenceSums = field(default_factory=SequenceSums)
    mean: SequenceSums = field(default_factory=SequenceSums)


@dataclass
class PairSums:
    """One SAE on one of its layers."""

    reconstruction: ReconstructionSums
    effect: SequenceSums = field(default_factory=SequenceSums)


class HeldoutSums:
    """All sums of the pass, per sequence.

    Attributes:
        clean: `ce` of the unchanged model and number of `predictions`. An effect has `ce` and
            `kl`, over the same predictions. If the model `predicts` nothing, clean has its
            `embedding` and number of `embeddings`, and an effect `embedding_loss`.
        tokens: number of tokens counted, including those with extreme norms on some layer.

    `saes` are by name, each alone; `together` also splices all layers of each grouping together.
    """

    def __init__(
        self,
        saes: dict[str, Suite],
        groupings: list[Grouping],
        together: bool,
        similarity_tokens: int,
        predicts: bool = True,
    ) -> None:
        self.saes, self.groupings, self.predicts = saes, groupings, predicts
        d_model = next(iter(saes.values())).d_model
        self.tokens = 0
        self.clean = SequenceSums()
        self.layers = {
            layer: LayerEffects(LayerSums(d_model))
            for layer in sorted({x for suite in saes.values() for x in suite.layers})
        }
        self.pairs = {
            (name, layer): PairSums(ReconstructionSums(d_model, suite.saes[name].d_sae))
            for name, suite in saes.items()
            for layer in suite.layers
        }
        self.together = {g.name: SequenceSums() for g in groupings} if together else {}
        self.similarity_left = similarity_tokens
        self.firings = {p: Firings(saes[p[0]].saes[p[0]].d_sae) for p in self._compared()}

    def _compared(self) -> list[Pair]:
        """Return per-layer SAEs and those of groups; none if there are no per-layer SAEs."""
        ways = [g for g in self.groupings if g.kind != "smaller"]
        if all(g.kind != "per_layer" for g in ways):
            return []
        return sorted({(name, layer) for g in ways for layer, name in g.sae_of_layer.items()})

    def update(
        self,
        tokens: Int[Tensor, "block pos"],
        splicer: Splicer,
        means: Float[Tensor, "layer d_model"],
        filters: TokenFilter,
    ) -> None:
        """Add some sequences.

        Positions that the filters leave out keep their own activation when spliced, and their
        predictions do not count, except for positions left out for their norm on one layer:
        every layer is judged on the same predictions.
        """
        output, acts = splicer.clean(tokens, self.layers)
        read = splicer.lm.read(tokens)
        counted = filters.tokens(read)
        self.tokens += tokens.numel() if counted is None else int(counted.sum())
        clean: CleanPredictions | CleanEmbeddings = (
            CleanPredictions(output, read, counted)
            if self.predicts
            else CleanEmbeddings(output, counted)
        )
        _add(self.clean, clean.sums)

        def splice(layer: int, x_hat: Tensor, keep: Tensor | None, into: SequenceSums) -> None:
            spliced = splicer.resume(layer, replaced(acts[layer], x_hat, keep))
            _add(into, clean.effect(spliced))

        for layer, effects in self.layers.items():
            x = acts[layer].float()
            keep = both(counted, filters.activations(x))
            effects.sums.update(x, keep)
            splice(layer, torch.zeros_like(x), keep, effects.zero)
            splice(layer, means[layer].expand_as(x), keep, effects.mean)
            for name in [name for name, where in self.pairs if where == layer]:
                sums = self.pairs[name, layer]
                latents, x_hat = _reconstruct(self.saes[name], x, layer)
                sums.reconstruction.update(x, x_hat, latents, keep)
                splice(layer, x_hat, keep, sums.effect)
                if self.similarity_left > 0 and (name, layer) in self.firings:
                    flat = None if keep is None else keep.flatten()
                    self.firings[name, layer].update(latents, flat)
        self.similarity_left -= tokens.numel()
        for grouping in self.groupings if self.together else []:
            owner = grouping.sae_of_layer

            def replace(layer: int, found: Tensor, owner: dict[int, str] = owner) -> Tensor:
                x = found.float()
                x_hat = _reconstruct(self.saes[owner[layer]], x, layer)[1]
                return replaced(found, x_hat, both(counted, filters.activations(x)))

            _add(self.together[grouping.name], clean.effect(splicer.together(replace, owner)))


@torch.no_grad()
def run_heldout(
    sums: HeldoutSums,
    parts: Iterable[Int[Tensor, "block pos"]],
    lm: HookedLM,
    means: Float[Tensor, "layer d_model"],
    filters: TokenFilter,
    advance: Callable[[int], object],
) -> int:
    """Add all parts to the sums; return the FLOPs, those of the first part scaled up.

    A part is one forward of held-out tokens; `advance` gets the number of its tokens. `means` are
    the mean activations of each layer, for mean ablation.
    """
    splicer = Splicer(lm)
    flops = per_token = 0.0
    for tokens in parts:
        if per_token:
            sums.update(tokens, splicer, means, filters)
        else:
            splicer.clean(tokens[:1], sums.layers)  # its first call checks itself: not counted
            with flop_counter() as counter:
                sums.update(tokens, splicer, means, filters)
            per_token = counter.get_total_flops() / tokens.numel()
        flops += per_token * tokens.numel()
        advance(tokens.numel())
    return round(flops)


def _reconstruct(suite: Suite, x: Tensor, layer: int) -> tuple[SparseLatents, Tensor]:
    latents = suite.encode_sparse(x.flatten(0, 1), layer)
    return latents, suite.decode_sparse(latents, layer).view_as(x)


def _add(sums: SequenceSums, rows: Mapping[str, Tensor]) -> None:
    """Add the sums of some blocks; embeddings only of those that are ranked."""
    full = len(sums["embedding"]) >= RANKED
    sums.append(**{name: row for name, row in rows.items() if not full or name != "embedding"})
