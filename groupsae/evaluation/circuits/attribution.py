"""How much each latent and each SAE's error matter for a task, by gradients.

With h the activations of a layer, s its norm factor, f the latents and e = h - D(f) the error,

    effect of latent i = (f_patch - f_clean)_i g . W_dec[i] / s
    effect of the error = g . (e_patch - e_clean)

approximate how the metric changes when one of them takes its value of the other prompt. They add
up to g . (h_patch - h_clean), so the error has what the latents leave. g is the gradient of the
metric of the **unmodified** model: f and e are leaves, what is below them gets the identity, and
decoders are linear, so no gradient passes through an SAE, and one gradient pass serves all SAEs of
a layer (the reference code multiplies the gradients of several layers' SAEs instead, which gives
effects of the wrong size and sign). Negative: the latent supports the answers to the clean prompt.

| method | g |
|---|---|
| `attribution` | mean over both runs, each the clean one of its direction of the pair |
| | (attribution patching, Syed et al., arXiv 2310.10348) |
| `ig_inputs` | mean over runs whose input of the first block lies between the two prompts |
| | (Hanna et al., arXiv 2403.17806) |
| `ig` | mean over values of the layer between the two runs, layer by layer (Marks et al., |
| | arXiv 2403.19647) |

The other means are over midpoints of equal steps: (k + 1/2) / steps. All of them are the same in
both directions of a pair, so one direction is enough.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from groupsae.evaluation.circuits.examples import Batch
from groupsae.lm.hooked import HookedLM
from groupsae.lm.hookpoints import Site
from groupsae.suite.layer import LayerSAE

METHODS = ("ig_inputs", "ig", "attribution")
Acts = dict[int, Float[Tensor, "example pos d_model"]]


def gradients(
    lm: HookedLM, batch: Batch, clean: Acts, patch: Acts, method: str, steps: int
) -> Acts:
    """Return g of each layer in `clean`: the mean gradient of the metric."""
    inputs = lm.inputs(batch.clean, last_logits=True)
    if method == "ig":
        return {
            layer: _along_layer(lm, inputs, batch, layer, clean, patch, steps) for layer in clean
        }
    entered = [_first_input(lm, tokens) for tokens in (batch.clean, batch.patch)]
    weights = [0.0, 1.0] if method == "attribution" else [(k + 0.5) / steps for k in range(steps)]
    total: Acts = {}
    for weight in weights:
        start = torch.lerp(entered[0], entered[1], weight).requires_grad_()
        found: Acts = {}

        def see(layer: int, acts: Tensor, found: Acts = found) -> Tensor:
            found[layer] = acts
            return acts  # a copy replaces it: some models write into the output of a block

        def enter(_: Tensor, start: Tensor = start) -> Tensor:
            return start * 1  # (a model may write into it)

        handle = Site(lm.blocks[0], before=True).watch(enter)
        try:
            logits = lm.run(inputs, clean, see, stop=False, grad=True).logits
        finally:
            handle.remove()
        # (a layer that reaches the logits only as zero has no gradient)
        grads = torch.autograd.grad(batch.metric(logits).sum(), list(found.values()))
        for layer, grad in zip(found, grads, strict=True):
            total[layer] = total[layer] + grad if layer in total else grad
    return {layer: grad / len(weights) for layer, grad in total.items()}


def _first_input(lm: HookedLM, tokens: Tensor) -> Tensor:
    """Return the residual stream before the first block."""
    seen: list[Tensor] = []
    handle = Site(lm.blocks[0], before=True).watch(lambda x: seen.append(x.clone()))
    try:
        lm.acts(tokens, [0])
    finally:
        handle.remove()
    return seen[0]


def _along_layer(
    lm: HookedLM,
    inputs: dict[str, Tensor],
    batch: Batch,
    layer: int,
    clean: Acts,
    patch: Acts,
    steps: int,
) -> Tensor:
    total = torch.zeros_like(clean[layer])
    for k in range(steps):
        here = torch.lerp(clean[layer], patch[layer], (k + 0.5) / steps).requires_grad_()
        logits = lm.run(inputs, [layer], lambda *_, here=here: here, stop=False, grad=True).logits
        total += torch.autograd.grad(batch.metric(logits).sum(), here)[0]
    return total / steps


class Effects:
    """The effects of one SAE's latents at one layer.

    Attributes:
        sums: over examples and positions, by latent.
        active: the latents that fire where the two prompts of an example differ.
    """

    def __init__(self, sae: LayerSAE) -> None:
        self.sae, self._totals = sae, torch.zeros(sae.d_sae, 2, dtype=torch.float64)

    @property
    def sums(self) -> Float64[Tensor, " d_sae"]:  # noqa: D102
        return self._totals[:, 0]

    @property
    def active(self) -> Bool[Tensor, " d_sae"]:  # noqa: D102
        return self._totals[:, 1] > 0

    @torch.no_grad()
    def update(self, g: Float[Tensor, "row d_model"], acts: Float[Tensor, "row d_model"]) -> None:
        """Add positions of examples: of the patch run with g, and of the clean run with -g."""
        sae = self.sae
        latents = sae.encode_sparse(acts)
        entries, values = latents.entries(sae.d_sae), latents.acts.flatten()
        kernels = entries.kernels(sae.W_dec)
        slopes = kernels.dots(g.to(sae.dtype), sae.W_dec, entries.starts, entries.latents)
        terms = torch.stack([values * slopes / sae.norm_factor, values], dim=1)
        self._totals.index_add_(0, entries.latents.cpu(), terms.double().cpu())


def attribute(
    lm: HookedLM,
    examples: Iterable[Batch],
    saes: Iterable[LayerSAE],
    method: str,
    steps: int,
    kept: Callable[[Tensor, Tensor], Tensor | None],
) -> dict[tuple[str, int], Effects]:
    """Return the effects of every SAE at its layer, by the SAE's name and the layer.

    Args:
        lm: the language model.
        examples: of the task, one direction of each pair.
        saes: all that are asked about, of any groupings.
        method: one of `METHODS`.
        steps: of the means.
        kept: of tokens and activations, which positions count; None: all.
    """
    found = {(sae.group, sae.layer): Effects(sae) for sae in saes}
    layers = sorted({layer for _, layer in found})
    for batch in examples:
        clean, patch = (lm.acts(tokens, layers) for tokens in (batch.clean, batch.patch))
        grads = gradients(lm, batch, clean, patch, method, steps)
        for layer in layers:
            # where the activations are equal no latent has an effect
            rows = (clean[layer] != patch[layer]).any(-1)
            keep = kept(batch.clean, clean[layer])
            rows = rows if keep is None else rows & keep
            g = grads[layer][rows]
            change = torch.cat([g, -g]), torch.cat([patch[layer][rows], clean[layer][rows]])
            for (_, at), effects in found.items():
                if at == layer:
                    effects.update(*change)
    return found
