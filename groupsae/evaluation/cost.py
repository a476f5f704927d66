"""The cost of training the SAEs of a grouping, and of evaluating them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from groupsae.cost.model import FORMAT, Trained, Workload, evaluation_flops
from groupsae.grouping.groupings import Grouping
from groupsae.grouping.rules import needs_distances
from groupsae.lm.geometry import Geometry
from groupsae.lm.hooked import HookedLM
from groupsae.runtime.errors import UserError
from groupsae.suite.suite import Suite


def relative_costs(
    ledger: Mapping[str, Any], groupings: Sequence[Grouping], saes: Mapping[str, Suite]
) -> dict[str, dict[str, float | None]]:
    """Return grouping -> its training cost relative to one SAE of full width per layer.

    By the paper's count, in true FLOPs, and in the seconds of the run that trained all of them.
    Every way to train is charged the seconds of measuring the layers, whose norm factors all
    need; the FLOPs of the distances only if it needs the distances.

    Raises:
        UserError: the ledger was written by another version.
    """
    if ledger.get("format") != FORMAT:
        raise UserError(
            f"ledger.json has format {ledger.get('format')}, this version of groupsae reads "
            f"{FORMAT}: evaluate the run with the version that trained it."
        )
    work = Workload.from_json(ledger["workload"])
    trained = {n: Trained(s.saes[n].d_sae, len(s.layers)) for n, s in saes.items()}
    parts = {part["part"]: part["seconds"] for part in ledger["parts"]}
    per_sae = {int(d_sae): seconds for d_sae, seconds in ledger["seconds_per_sae"].items()}

    maps = ledger.get("seconds_of_maps", 0.0)  # more, for layers that have something of their own

    def seconds(saes: Sequence[Trained]) -> float:
        each = (
            (per_sae[n] + maps * (layers > 1)) * work.rows_per_token(layers) for n, layers in saes
        )
        return parts["activations"] + parts["distances"] + sum(each)

    full = [Trained(max(each.d_sae for each in trained.values()), 1)] * work.layers_run
    paper, flops, wall = work.paper_total(full), work.total(full, distances=False), seconds(full)
    costs: dict[str, dict[str, float | None]] = {}
    for grouping in groupings:
        served = [trained[name] for name in set(grouping.sae_of_layer.values())]
        measured = grouping.kind == "groups" and all(map(needs_distances, grouping.rules))
        costs[grouping.name] = {
            "paper": work.paper_total(served) / paper,
            "flops": work.total(served, distances=measured) / flops,
            "seconds": seconds(served) / wall,
        }
    return costs


def planned_flops(
    geometry: Geometry,
    context: int,
    saes: Mapping[str, Suite],
    together: Sequence[Grouping],
    lm: HookedLM,
) -> int:
    """Return the FLOPs per token of the evaluation.

    Each grouping of `together` takes one more full forward, with all its layers spliced.
    """
    cost = {name: suite.saes[name].inference_flops() for name, suite in saes.items()}
    served = [
        [cost[name] for name, suite in saes.items() if layer in suite.layers]
        for layer in range(geometry.num_layers)
    ]
    count = partial(
        evaluation_flops,
        num_layers=geometry.num_layers,
        d_model=geometry.d_model,
        context=context,
        vocab_size=geometry.vocab_size if lm.predicts else 0,
        own_block=lm.hookpoint != "resid_post",
    )
    spliced = sum(cost[name] for g in together for name in g.sae_of_layer.values())
    return count(served=served) + len(together) * count(served=[]) + spliced
