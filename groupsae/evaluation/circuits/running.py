"""The model with only the latents of a circuit, all others ablated, at every layer with an SAE.

At each layer of the running forward, with h its activations, f = Enc(s h), the ablation's values a
and a mask c that is 1 in the circuit,

    f' = c f + (1 - c) a      h' = h + (f' - f) W_dec / s      (the error is kept)
                              h' = D(f')                       (there is none)

The first form leaves h as it is, bit for bit, where f' = f.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from groupsae.data.filters import replaced
from groupsae.evaluation.circuits.attribution import Effects
from groupsae.evaluation.circuits.examples import Batch
from groupsae.evaluation.parts import Subject
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SparseLatents
from groupsae.suite.layer import LayerSAE

Circuit = dict[int, Bool[Tensor, " d_sae"]]  # which latents of each layer are in
# the value of each layer's latents outside of a circuit
Ablation = Mapping[int, SparseLatents | Float[Tensor, "*pos d_sae"]]


def without(circuit: Circuit) -> Circuit:
    """Return everything that is not in a circuit."""
    return {layer: ~latents for layer, latents in circuit.items()}


class Order:
    """The latents of a grouping, from the largest effect to the smallest.

    Args:
        effects: of each layer's SAE.
        select: `global`, one order of all latents that are active on the task; or `per_layer`, as
            many latents of each layer (the paper).
        generator: a random order instead, the control.

    Attributes:
        active: the number of latents that are active on the task, over all layers.
    """

    def __init__(
        self,
        effects: Mapping[int, Effects],
        select: str,
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
        ordered = scores if select == "per_layer" else [torch.cat(scores)]
        ranks = [score.argsort(descending=True, stable=True).argsort() for score in ordered]
        self._ranks = torch.cat(ranks)

    def size(self, fraction: float) -> int:
        """Return N for a fraction: of the active latents, or of a layer's latents (per_layer)."""
        most = self.active if self.select == "global" else max(self.widths)
        return max(1, round(fraction * most))

    def first(self, count: int) -> Circuit:
        """Return the circuit of the first latents, with `per_layer` of so many of each layer."""
        return dict(zip(self.layers, (self._ranks < count).split(self.widths), strict=True))

    def everything(self) -> Circuit:
        """Return the circuit of all latents, also those that are not active on the task."""
        return self.first(sum(self.widths))


def patched(subject: Subject, batch: Batch, saes: Mapping[int, LayerSAE]) -> Ablation:
    """Return the values for the patch prompts."""
    acts = subject.lm.acts(batch.patch, saes)
    return {layer: sae.encode_sparse(acts[layer]) for layer, sae in saes.items()}


@torch.no_grad()
def averaged(
    subject: Subject, examples: Sequence[Batch], saes: Mapping[int, LayerSAE], task: str
) -> Ablation:
    """Return the means over clean prompts, at each position.

    Raises:
        UserError: the prompts have different lengths.
    """
    lengths = {batch.clean.shape[1] for batch in examples}
    if len(lengths) > 1:
        raise UserError(
            f"the prompts of {task} have {min(lengths)} to {max(lengths)} tokens, and means need "
            "equal positions: use evaluation.circuits.ablation=patch."
        )
    sums: dict[int, Tensor] = {}
    for batch in examples:
        for layer, acts in subject.lm.acts(batch.clean, saes).items():
            sums[layer] = sums.get(layer, 0) + saes[layer].encode(acts).sum(0)
    count = sum(len(batch.clean) for batch in examples)
    return {layer: total / count for layer, total in sums.items()}


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

    `errors` is `keep` (the running forward's error) or `none` (reconstructions only).
    """

    def visit(layer: int, acts: Tensor) -> Tensor:
        sae, inside, outside = saes[layer], circuit[layer].to(acts.device), ablation[layer]
        f = sae.encode(acts)
        a = outside.dense(sae.d_sae) if isinstance(outside, SparseLatents) else outside
        changed = torch.where(inside, f, a)
        if errors == "keep":
            difference = changed - f
            moved = difference.flatten(0, 1).any(0).nonzero()[:, 0]  # most latents never fire
            new = acts + sae.unscaled(difference[..., moved] @ sae.W_dec[moved]).to(acts)
        else:
            new = sae.decode(changed)
        return replaced(acts, new, subject.kept(batch.clean, acts))

    inputs = subject.lm.inputs(batch.clean, last_logits=True)
    return batch.metric(subject.lm.run(inputs, saes, visit, stop=False).logits).cpu()
