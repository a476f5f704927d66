"""What training costs in FLOPs: the paper's model, and the true count of a run."""

from dataclasses import asdict, dataclass
from typing import Any


def activation_flops(num_layers: int, d_model: int, context: int) -> int:
    """Return the paper's A: FLOPs per token of the language model's forward pass.

    A = 24 L d^2 + 4 L ctx d (paper section 3.3): 2 FLOPs for each of the 12 d^2 weights of a
    layer, and full (not causally halved) attention; no embedding, no head.

    >>> round(activation_flops(12, 768, 1024) * 1e9 / 1e15, 2)  # Pythia-160M, PFLOPs per 1e9
    207.62
    """
    return 24 * num_layers * d_model**2 + 4 * num_layers * context * d_model


def sae_flops(d_model: int, d_sae: int) -> int:
    """Return the paper's T: FLOPs per token of training one dense SAE, 10 d n.

    Encoder forward and weight gradient 2 d n each, decoder forward 2 d n and both its gradients
    4 d n.

    >>> round(sae_flops(768, 16 * 768) * 1e9 / 1e15, 2)
    94.37
    """
    return 10 * d_model * d_sae


def topk_flops(d_model: int, d_sae: int, k: int) -> int:
    """Return the FLOPs per token that our TopK step really does.

    Encoder forward and weight gradient are dense, 2 d n each; decoding and its two gradients
    touch k rows, 2 d k each. AuxK, which runs only while latents are dead, is not counted.
    """
    return 4 * d_model * d_sae + 6 * d_model * k


def paper_saving(activation: float, sae: float, num_groups: int, num_layers: int) -> float:
    """Return 1 - (A + G T) / (A + L T), the saving as the paper counts it.

    >>> round(paper_saving(207.62, 94.37, 6, 12), 4)
    0.4225
    """
    return 1 - (activation + num_groups * sae) / (activation + num_layers * sae)


def paper_saving_both_sides(
    activation: float, sae: float, num_groups: int, num_layers: int
) -> float:
    """Return 1 - (A + (G + 1) T) / (A + L T): the last layer's own SAE is paid on both sides.

    The paper leaves the last layer out of the G groups but counts it in L; a run that gives it
    an SAE of its own trains G + 1. The published groups then save 35.2, 49.6 and 48.4 % (Pythia
    160M, 410M, 1B) instead of 42.3, 53.2 and 53.8 %.

    >>> round(paper_saving_both_sides(207.62, 94.37, 6, 12), 3)
    0.352
    """
    return paper_saving(activation, sae, num_groups + 1, num_layers)


def distance_flops(num_layers: int, d_model: int) -> int:
    """Return the FLOPs per token of the angular distances: one product of all pairs, 2 L^2 d."""
    return 2 * num_layers**2 * d_model


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """FLOPs of one run, and of training one SAE per layer on as many tokens.

    Attributes:
        paper_activations: A of the paper, per token.
        paper_sae: T of the paper, per token.
        paper_saving: as the paper counts: L SAEs against G without the last layer's.
        activations: true FLOPs per token of the truncated forward.
        sae: true FLOPs per token of one SAE.
        calibration: true FLOPs of the forward over the calibration text, once for the run;
            per-layer SAEs need it as well, for their norm factors.
        distances: true FLOPs of the angular distances, which only groups need.
        total: true FLOPs of the run.
        total_per_layer: the same with one SAE per layer, which needs no distances.
        saving: 1 - total / total_per_layer, the last layer alike on both sides.
    """

    paper_activations: int
    paper_sae: int
    paper_saving: float
    activations: int
    sae: int
    calibration: int
    distances: int
    total: int
    total_per_layer: int
    saving: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def run_cost(
    *,
    num_layers: int,
    layers_run: int,
    num_groups: int,
    num_saes: int,
    num_covered: int,
    d_model: int,
    d_sae: int,
    k: int,
    context: int,
    tokens: int,
    calibration_tokens: int,
) -> RunCost:
    """Return the cost of a run.

    Args:
        num_layers: L, blocks of the language model.
        layers_run: blocks the truncated forward needs.
        num_groups: G, groups of the partition, without an SAE of the last layer's own.
        num_saes: SAEs trained.
        num_covered: layers that have an SAE, which per-layer training would train one each for.
        d_model: width of the residual stream.
        d_sae: latents.
        k: active latents.
        context: tokens in a block.
        tokens: training tokens, the same for every SAE.
        calibration_tokens: tokens that passed through the model to measure the distances; counted
            in full even where they came from the cache, so that the cache changes no figure.
    """
    paper_a, paper_t = activation_flops(num_layers, d_model, context), sae_flops(d_model, d_sae)
    forward, sae = activation_flops(layers_run, d_model, context), topk_flops(d_model, d_sae, k)
    calibration = calibration_tokens * paper_a
    distances = calibration_tokens * distance_flops(num_layers, d_model)
    total = tokens * (forward + num_saes * sae) + calibration + distances
    total_per_layer = tokens * (forward + num_covered * sae) + calibration
    return RunCost(
        paper_activations=paper_a,
        paper_sae=paper_t,
        paper_saving=paper_saving(paper_a, paper_t, num_groups, num_layers),
        activations=forward,
        sae=sae,
        calibration=calibration,
        distances=distances,
        total=total,
        total_per_layer=total_per_layer,
        saving=1 - total / total_per_layer,
    )
