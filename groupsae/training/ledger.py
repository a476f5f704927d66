"""The cost ledger of a run: FLOPs planned, FLOPs and seconds measured, part by part."""

from dataclasses import asdict
from typing import Any

import torch

from groupsae.cost.counter import flop_counter
from groupsae.cost.model import FORMAT, Workload
from groupsae.data.activations import ActivationDataModule
from groupsae.data.batch import ActivationBatch
from groupsae.grouping.angles import AngularDistance
from groupsae.grouping.groupings import groupings
from groupsae.grouping.plan import GroupPlan
from groupsae.sae.base import GlobalBatch
from groupsae.training.callbacks.grouping import GroupLayers
from groupsae.training.callbacks.throughput import Throughput
from groupsae.training.parallel.collect import gather
from groupsae.training.suite import GroupSAESuite

FEW = 64  # rows that the FLOPs of an SAE are counted on


def ledger(
    suite: GroupSAESuite,
    data: ActivationDataModule,
    grouping: GroupLayers,
    throughput: Throughput,
    seconds: tuple[float, float],
) -> dict[str, Any]:
    """Return what the run cost and what its groups saved, as plain values.

    Seconds are wall clock (on a GPU its own clock) of this run; of the distances, of the run that
    measured them, if they came from the cache. Those of per-layer training at
    equal tokens are not a second run's: the language model's are the same, and an SAE takes what
    one of this run's takes. SAEs of several widths are stepped together, so what all of them took
    is shared out among the widths as the trial before the start found it.
    """
    plan, work, cost = grouping.plan, grouping.work, grouping.cost
    assert plan is not None
    assert work is not None
    assert cost is not None
    d_saes = [suite.size(each.width).d_sae for each in plan.members]
    planned = work.saes(d_saes)
    lm_flops, distance_flops, sae_flops = _measured_flops(data, suite, work)
    activations, saes = seconds
    validation, distances = throughput.validation.seconds, grouping.measurement.seconds
    trial = {1.0: 1.0} if grouping.forecast is None else grouping.forecast.step_seconds
    unit = saes / sum(trial[planned.width] for planned in plan.members)
    seconds_of = {p.name: unit * trial[p.width] for p in plan.members}
    full = unit * trial[1.0]
    groups_seconds = activations + distances + full * len(plan.saes)
    per_layer_seconds = activations + distances + full * work.layers_run
    return {
        "format": FORMAT,
        "device": str(data.device),
        "threads": torch.get_num_threads(),
        "tokens": work.tokens,
        "num_saes": len(d_saes),
        "workload": asdict(work),
        "seconds_per_sae": {
            str(d_sae): seconds_of[p.name] for p, d_sae in zip(plan.members, d_saes, strict=True)
        },
        "parts": [
            _part("activations", work.tokens * work.activations, lm_flops, activations),
            _part("distances", work.calibration + work.distances, distance_flops, distances),
            _part("saes", planned, sae_flops, saes),
            _part("validation", None, None, validation),
            *([_part("store", None, None, data.fill_seconds)] if data.is_stored else []),
            _part("other", None, None, throughput.all.seconds - activations - saes - validation),
        ],
        "per_layer": {"planned_flops": cost.total_per_layer, "seconds": per_layer_seconds},
        "saving": {
            "paper": cost.paper_saving,
            "paper_both_sides": cost.paper_saving_both_sides,
            "flops": cost.saving,
            "seconds": 1 - groups_seconds / per_layer_seconds,
        },
        "sharing": _sharing(
            plan,
            seconds_of,
            activations=activations,
            saes=saes,
            wall=throughput.all.seconds - validation,
        ),
    }


def seconds_of_all(
    data: ActivationDataModule, throughput: Throughput, spread: bool
) -> tuple[float, float]:
    """Return the seconds of the language model's forwards and of the SAEs' steps.

    Where SAEs are spread over the processes, the mean of the processes' for the SAEs; for the
    model that of the one which took least, because rows are waited for where they come in, by
    all but the slowest owner. What is lost by waiting is then in `other`.

    Args:
        data: with the stopwatch of the model.
        throughput: with that of the SAEs.
        spread: whether SAEs are spread; then all processes call this.
    """
    mine = data.stopwatch.seconds, throughput.saes.seconds
    if not spread:
        return mine
    activations, saes = zip(*gather(mine), strict=True)
    return min(activations), sum(saes) / len(saes)


def _sharing(
    plan: GroupPlan,
    seconds_of: dict[str, float],
    *,
    activations: float,
    saes: float,
    wall: float,
) -> dict[str, Any] | None:
    """Return what training all groupings at once saved against one run for each of them.

    `seconds` is the wall clock of training, the loop's own time included; `seconds_separately`
    counts the language model and the SAEs of each grouping only, so the factor is a lower bound.
    (Distances are measured once on both sides: they are cached.) `bound_seconds` is what it must
    stay below: the language model's forward times two, and each SAE once.
    """
    if not plan.others:
        return None
    found = groupings(plan)
    separate = sum(
        activations + sum(seconds_of[name] for name in set(each.sae_of_layer.values()))
        for each in found
    )
    return {
        "groupings": len(found),
        "seconds": wall,
        "seconds_separately": separate,
        "factor": separate / wall,
        "bound_seconds": 2 * activations + saes,
    }


def _part(part: str, planned: int | None, measured: int | None, seconds: float) -> dict[str, Any]:
    return {
        "part": part,
        "planned_flops": planned,
        "measured_flops": measured,
        "seconds": seconds,
    }


def _measured_flops(
    data: ActivationDataModule, suite: GroupSAESuite, work: Workload
) -> tuple[int, int, int]:
    """Return what a FLOP counter sees of the run: of one block, extrapolated.

    Where activations are read from a store, the language model runs in neither training nor
    measuring: nothing is seen of it, though the plan counts its forwards as if they were streamed.

    For the language model in training, for the distances (the forward over the calibration text
    included) and for the SAEs, which run as they do in training, but for AuxK. Nothing of them
    is changed (eval: a running threshold stands still). The SAEs are counted on a few rows and on
    the CPU, whose operators the counter knows; it sees nothing of a Triton program.
    """
    # after fitting Lightning leaves the SAEs on the CPU; the language model is where it ran
    device, geometry = data.device, data.lm.geometry
    rows, every = data.first_rows(data.slots, 1), list(range(geometry.num_layers))
    with flop_counter() as lm:  # sees none where rows are read from a store
        batch = rows()
    num_tokens = batch.acts.shape[1]
    angles = AngularDistance(
        num_layers=geometry.num_layers, d_model=geometry.d_model, centring="none"
    ).to(device)
    with flop_counter() as calibration:
        if data.is_stored:  # values do not matter
            layers = torch.tensor(every, device=device)[:, None].expand(-1, num_tokens)
            acts = torch.ones(len(every), num_tokens, geometry.d_model, device=device)
            parts = [ActivationBatch(acts, layers, None)]
        else:
            tokens = next(iter(data.loader("train", 1)))[:1]
            parts = list(data.every_layer(tokens, every))
    with flop_counter() as distances:
        for each in parts:
            angles.update(each.acts, each.everywhere())
    of_saes, plan = 0.0, suite.plan
    assert plan is not None
    held = {member.name: member for member in suite.members()}
    for planned in plan.members:
        slot = data.slots.index(planned.layers)
        # of what another process holds, a fresh one: it costs the same
        member = (held.get(planned.name) or suite.make_member(planned, data.slots)).cpu()
        acts, layers = batch.rows(slot)
        few = slice(min(FEW, len(acts)))
        x = member.scaled(acts[few].cpu(), layers[few].cpu())
        with flop_counter() as sae, torch.enable_grad():
            output = member.sae.eval().forward(
                x, GlobalBatch(torch.ones(()), member.dead_latents(0))
            )
            torch.stack(list(output.losses.values())).sum().backward()
        member.zero_grad()
        of_saes += sae.get_total_flops() * (len(acts) / max(1, len(x))) / num_tokens
    measured = (counter.get_total_flops() for counter in (lm, calibration, distances))
    of_lm, of_calibration, of_distances = (n / num_tokens for n in measured)
    measuring = work.calibration_passes * of_calibration + of_distances
    return (
        round(work.tokens * of_lm),
        round(work.calibration_tokens * measuring),
        round(work.tokens * of_saes),
    )
