"""The cost of training in FLOPs: the paper's model, and the true count of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMAT = 2  # of ledger.json


def activation_flops(num_layers: int, d_model: int, context: int) -> int:
    """Return the paper's A: FLOPs per token of the language model's forward pass.

    A = 24 L d^2 + 4 L ctx d (paper, section 3.3): 2 FLOPs for each of a layer's 12 d^2 weights,
    and full (not causally halved) attention; no embedding, no head.

    >>> round(activation_flops(12, 768, 1024) * 1e9 / 1e15, 2)  # Pythia-160M, PFLOPs per 1e9
    207.62
    """
    return 24 * num_layers * d_model**2 + 4 * num_layers * context * d_model


def sae_flops(d_model: int, d_sae: int) -> int:
    """Return the paper's T: FLOPs per token of training one dense SAE, 10 d n.

    2 d n each: the encoder's forward and weight gradient, the decoder's forward and two gradients.

    >>> round(sae_flops(768, 16 * 768) * 1e9 / 1e15, 2)
    94.37
    """
    return 10 * d_model * d_sae


def paper_saving(activation: float, sae: float, num_groups: int, num_layers: int) -> float:
    """Return 1 - (A + G T) / (A + L T), the saving as the paper counts it.

    The paper leaves the last layer out of G but counts it in L. A run that gives it an SAE of its
    own trains G + 1: counted so, the published groups save 35.2, 49.6 and 48.4 % (Pythia 160M,
    410M, 1B) instead of 42.3, 53.2 and 53.8 %.

    >>> round(paper_saving(207.62, 94.37, 6, 12), 4)
    0.4225
    >>> round(paper_saving(207.62, 94.37, 6 + 1, 12), 3)
    0.352
    """
    return 1 - (activation + num_groups * sae) / (activation + num_layers * sae)


def distance_flops(num_layers: int, d_model: int) -> int:
    """Return the FLOPs per token of the angular distances: one product of all pairs, 2 L^2 d."""
    return 2 * num_layers**2 * d_model


def evaluation_flops(
    *,
    num_layers: int,
    d_model: int,
    context: int,
    vocab_size: int,
    served: Sequence[Sequence[int]],
    own_block: bool,
) -> int:
    """Return the FLOPs per token of an evaluation on held-out text.

    One clean forward with the head, 2 d V; for every layer the blocks above it and the head once
    for each of two ablations and each SAE; each SAE's encoder and decoder. Not counted: the pass
    over calibration text for the means of mean ablation.

    `served` has for each layer the FLOPs of encoding and decoding with each of its SAEs; a layer
    without any is not ablated. `own_block`: a layer's own block runs again too, because its input
    is replaced.
    """
    head = 2 * d_model * vocab_size
    total = activation_flops(num_layers, d_model, context) + head
    for layer, saes in enumerate(served):
        if not saes:
            continue
        above = num_layers - layer - (0 if own_block else 1)
        rest = activation_flops(above, d_model, context) + head
        total += (2 + len(saes)) * rest + sum(saes)
    return total


class Trained(NamedTuple):
    """An SAE of a run, as far as its cost depends on it."""

    d_sae: int
    layers: int  # how many it serves


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model, the text and the budget, which all ways to train SAEs on one stream share."""

    num_layers: int
    layers_run: int  # by the truncated forward
    d_model: int
    sae_flops: Mapping[int, int]  # d_sae -> true FLOPs per row of training such an SAE
    context: int
    tokens: int  # the training budget, the same for every SAE
    calibration_tokens: int  # that the distances were measured on, in the cache or not
    calibration_passes: int  # forwards of the model over them; centring takes two
    layers_per_token: int = 1  # most rows that a token gives to an SAE; not in older files
    maps_flops: int = 0  # more per row where layers have something of their own, `SAE.maps`

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Workload":
        """Return the workload of a file's fields; keys of JSON are strings."""
        flops = {int(d_sae): value for d_sae, value in stored["sae_flops"].items()}
        return cls(**{**stored, "sae_flops": flops})

    @property
    def activations(self) -> int:
        """Return the FLOPs per token of the truncated forward."""
        return activation_flops(self.layers_run, self.d_model, self.context)

    @property
    def calibration(self) -> int:
        """Return the FLOPs of the forward over the calibration text, for all kinds of groups."""
        each = activation_flops(self.num_layers, self.d_model, self.context)
        return self.calibration_passes * self.calibration_tokens * each

    @property
    def distances(self) -> int:
        """Return the FLOPs of the angular distances, which only groups need.

        Those of the other centring, on a small sample, are not counted.
        """
        return self.calibration_tokens * distance_flops(self.num_layers, self.d_model)

    def rows_per_token(self, layers: int) -> int:
        """Return how many rows a token gives to an SAE of so many layers."""
        return min(self.layers_per_token, layers)

    def saes(self, saes: Sequence[Trained]) -> int:
        """Return the FLOPs of all steps of some SAEs."""
        return self.tokens * sum(
            self.rows_per_token(layers)
            * (self.sae_flops[n] + (self.maps_flops if layers > 1 else 0))
            for n, layers in saes
        )

    def total(self, saes: Sequence[Trained], distances: bool) -> int:
        """Return the true FLOPs of training these SAEs, with the language model's."""
        shared = self.tokens * self.activations + self.calibration
        return shared + self.saes(saes) + (self.distances if distances else 0)

    def paper_total(self, saes: Sequence[Trained]) -> int:
        """Return A + sum T per token, as the paper counts: dense SAEs, all layers run."""
        paper = activation_flops(self.num_layers, self.d_model, self.context)
        each = (sae_flops(self.d_model, n) * self.rows_per_token(layers) for n, layers in saes)
        return paper + sum(each)


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """FLOPs of one run, and of training one SAE per layer on as many tokens."""

    paper_activations: int  # A of the paper, per token
    paper_sae: int  # T of the paper, per token
    paper_saving: float  # L SAEs against G without the last layer's
    paper_saving_both_sides: float  # the same with every SAE counted on both sides
    activations: int  # of the truncated forward, per token
    sae: int  # per row
    calibration: int  # of the forward over the calibration text
    distances: int  # 0 where the groups need none
    total: int
    total_per_layer: int  # with one SAE per layer, which needs no distances
    saving: float  # 1 - total / total_per_layer


def run_cost(
    work: Workload, *, saes: Sequence[int], num_groups: int, d_sae: int, distances: bool
) -> RunCost:
    """Return the cost of serving the layers with groups, against one SAE for each of them.

    `saes` has the number of layers of each SAE, the last layer's own one after the `num_groups`
    groups.
    """
    paper_a = activation_flops(work.num_layers, work.d_model, work.context)
    paper_t = sae_flops(work.d_model, d_sae)
    rows = [work.rows_per_token(layers) for layers in saes]
    total = work.total([Trained(d_sae, layers) for layers in saes], distances=distances)
    total_per_layer = work.total([Trained(d_sae, 1)] * work.layers_run, distances=False)
    return RunCost(
        paper_activations=paper_a,
        paper_sae=paper_t,
        paper_saving=paper_saving(paper_a, paper_t, sum(rows[:num_groups]), work.num_layers),
        paper_saving_both_sides=paper_saving(paper_a, paper_t, sum(rows), work.layers_run),
        activations=work.activations,
        sae=work.sae_flops[d_sae],
        calibration=work.calibration,
        distances=work.distances if distances else 0,
        total=total,
        total_per_layer=total_per_layer,
        saving=1 - total / total_per_layer,
    )
