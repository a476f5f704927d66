"""What the SAEs of a grouping cost to train, and what it costs to evaluate them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from groupsae.cost.model import Workload, evaluation_flops
from groupsae.grouping.groupings import Grouping
from groupsae.interop.suite import Suite
from groupsae.lm.load import Geometry


def relative_costs(
    ledger: Mapping[str, Any], found: Sequence[Grouping], saes: Mapping[str, Suite]
) -> dict[str, dict[str, float | None]]:
    """Return grouping -> its cost relative to one SAE of full width per layer.

    By the paper's count, in true FLOPs, and in the seconds of the run that trained all of them.

    Args:
        ledger: of that run.
        found: the groupings.
        saes: name -> that SAE alone.
    """
    work = Workload(**ledger["workload"])
    widths = {name: suite.saes[name].d_sae for name, suite in saes.items()}
    parts = {part["part"]: part["seconds"] for part in ledger["parts"]}
    each_sae = {int(d_sae): seconds for d_sae, seconds in ledger["seconds_per_sae"].items()}

    def seconds(d_saes: Sequence[int]) -> float:
        return parts["activations"] + parts["distances"] + sum(each_sae[n] for n in d_saes)

    full = [max(widths.values())] * work.layers_run
    paper, flops, wall = work.paper_total(full), work.total(full, distances=False), seconds(full)
    costs: dict[str, dict[str, float | None]] = {}
    for each in found:
        mine = [widths[name] for name in set(each.sae_of_layer.values())]
        measured = each.kind == "groups" and each.rules != ["even"]
        costs[each.name] = {
            "paper": work.paper_total(mine) / paper,
            "flops": work.total(mine, distances=measured) / flops,
            "seconds": seconds(mine) / wall,
        }
    return costs


def planned_flops(
    geometry: Geometry, context: int, saes: Mapping[str, Suite], together: Sequence[Grouping]
) -> int:
    """Return the FLOPs per token of the evaluation.

    Args:
        geometry: of the language model.
        context: tokens in a block.
        saes: name -> that SAE alone.
        together: groupings with all layers spliced at once, which is one more whole forward each.
    """
    each = {
        name: 2 * suite.d_model * (suite.saes[name].d_sae + suite.saes[name].k)
        for name, suite in saes.items()
    }
    served = [
        [each[name] for name, suite in saes.items() if layer in suite.layers]
        for layer in range(geometry.num_layers)
    ]
    count = partial(
        evaluation_flops,
        num_layers=geometry.num_layers,
        d_model=geometry.d_model,
        context=context,
        vocab_size=geometry.vocab_size,
    )
    spliced = [
        count(served=[]) + sum(each[name] for name in grouping.sae_of_layer.values())
        for grouping in together
    ]
    return count(served=[costs for costs in served if costs]) + sum(spliced)
