"""The model with only the latents of a circuit, all others ablated, at every layer with an SAE.

At each layer of the running forward, with h its activations, f = Enc(s h), the ablation's values a
and a mask c that is 1 in the circuit,

    f' = c f + (1 - c) a      h' = h + (f' - f) W_dec / s      (the error is kept)
                              h' = D(f') + error               (it takes another value)

The first form leaves h as it is, bit for bit, where f' = f.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from groupsae.evaluation.circuits.attribution import Effects
from groupsae.evaluation.circuits.examples import Batch
from groupsae.evaluation.parts import Subject
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SparseLatents
from groupsae.suite.layer import LayerSAE


class Circuit(NamedTuple):
    """Which latents of each layer are in, and of which layers the error is."""

    latents: dict[int, Bool[Tensor, " d_sae"]]
    errors: dict[int, bool]

    def without(self) -> "Circuit":
        """Return everything that is not in it."""
        outside = {layer: ~latents for layer, latents in self.latents.items()}
        return Circuit(outside, {layer: not kept for layer, kept in self.errors.items()})


class Order:
    """The nodes of a grouping, from the largest effect to the smallest.

    Args:
        effects: of each layer's SAE.
        select: `global`, one order of all latents that are active on the task; or `per_layer`, as
            many latents of each layer (the paper).
        errors: whether the errors are nodes, too.
        generator: a random order instead, the control.

    Attributes:
        active: the number of latents that are active on the task, over all layers.
    """

    def __init__(
        self,
        effects: Mapping[int, Effects],
        select: str,
        errors: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        self.layers, self.select = list(effects), select
        self.widths = [len(each.sums) for each in effects.values()]
        self.active = int(sum(each.active.sum() for each in effects.values()))
        scores = []
        for each in effects.values():
            size = each.sums.abs()
            if generator is not None:
                size = torch.rand(len(size), generator=generator, dtype=torch.float64)
            scores.append(torch.where(each.active, size, -1.0))
        by_error = torch.tensor([abs(e.error) if errors else -1.0 for e in effects.values()])
        if errors and generator is not None:
            by_error = torch.rand(len(by_error), generator=generator)
        if select == "per_layer":
            ranks = [score.argsort(descending=True, stable=True).argsort() for score in scores]
            self._ranks = torch.cat([*ranks, torch.full((len(ranks),), max(self.widths))])
        else:
            found = torch.cat([*scores, by_error.double()])
            self._ranks = found.argsort(descending=True, stable=True).argsort()

    def size(self, fraction: float) -> int:
        """Return N for a fraction: of the active latents, or of a layer's latents (per_layer)."""
        most = self.active if self.select == "global" else max(self.widths)
        return max(1, round(fraction * most))

    def first(self, count: int) -> Circuit:
        """Return the circuit of the first nodes, with `per_layer` of so many of each layer."""
        *latents, errors = (self._ranks < count).split([*self.widths, len(self.layers)])
        named = dict(zip(self.layers, latents, strict=True))
        return Circuit(named, dict(zip(self.layers, errors.tolist(), strict=True)))


class Ablation(NamedTuple):
    """What latents and errors become outside of a circuit, by layer; None: zero."""

    latents: Mapping[int, SparseLatents | Float[Tensor, "pos d_sae"]] | None
    errors: Mapping[int, Float[Tensor, "*example pos d_model"]] | None


def patched(subject: Subject, batch: Batch, saes: Mapping[int, LayerSAE]) -> Ablation:
    """Return the values of the patch prompts."""
    acts = subject.lm.acts(batch.patch, saes)
    latents = {layer: sae.encode_sparse(acts[layer]) for layer, sae in saes.items()}
    errors = {
        layer: acts[layer].to(sae.dtype) - sae.decode(latents[layer])
        for layer, sae in saes.items()
    }
    return Ablation(latents, errors)


@torch.no_grad()
def averaged(
    subject: Subject, examples: Iterable[Batch], saes: Mapping[int, LayerSAE], task: str
) -> Ablation:
    """Return the means over clean prompts, at each position.

    Raises:
        UserError: the prompts have different lengths.
    """
    latents: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    count, lengths = 0, set()
    for batch in examples:
        lengths.add(batch.clean.shape[1])
        if len(lengths) > 1:
            raise UserError(
                f"the prompts of {task} have {min(lengths)} to {max(lengths)} tokens, and means "
                "need equal positions: use evaluation.circuits.ablation=patch."
            )
        count += len(batch.clean)
        for layer, acts in subject.lm.acts(batch.clean, saes).items():
            found = saes[layer].encode(acts)
            error = acts.to(found.dtype) - saes[layer].decode(found)
            latents[layer] = latents.get(layer, 0) + found.sum(0)
            errors[layer] = errors.get(layer, 0) + error.sum(0)
    return Ablation(
        {layer: total / count for layer, total in latents.items()},
        {layer: total / count for layer, total in errors.items()},
    )


@torch.no_grad()
def run_circuit(
    subject: Subject,
    batch: Batch,
    saes: Mapping[int, LayerSAE],
    circuit: Circuit,
    ablation: Ablation,
    errors: str,
) -> Float64[Tensor, " example"]:
    """Return the metric of every example with a circuit only.

    `errors` is `keep` (the running forward's error), `none` (no error: reconstructions only),
    `circuit` (kept where the error is in the circuit, otherwise ablated) or `ablate`.
    """

    def visit(layer: int, acts: Tensor) -> Tensor:
        sae, inside = saes[layer], circuit.latents[layer].to(acts.device)
        f = sae.encode(acts)
        a = torch.zeros_like(f)
        if ablation.latents is not None:
            found = ablation.latents[layer]
            a = found.dense(sae.d_sae) if isinstance(found, SparseLatents) else found
        changed = torch.where(inside, f, a)
        if errors == "keep" or (errors == "circuit" and circuit.errors[layer]):
            difference = changed - f
            moved = difference.flatten(0, 1).any(0).nonzero()[:, 0]  # most latents never fire
            new = acts + sae.unscaled(difference[..., moved] @ sae.W_dec[moved]).to(acts)
        else:
            new = sae.decode(changed)
            if errors != "none" and ablation.errors is not None:
                new = new + ablation.errors[layer]
        keep = subject.kept(batch.clean, acts)
        return new.to(acts) if keep is None else torch.where(keep[..., None], new.to(acts), acts)

    inputs = subject.lm.inputs(batch.clean, last_logits=True)
    return batch.metric(subject.lm.run(inputs, saes, visit, stop=False).logits).cpu()


def in_order(batches: Sequence[Batch], parts: Sequence[Tensor]) -> Float64[Tensor, " every"]:
    """Return the metrics of all examples, batch by batch, in the order of the task."""
    return torch.cat(list(parts))[torch.cat([batch.numbers for batch in batches]).argsort()]
