"""The cost ledger of a run: FLOPs planned, FLOPs and seconds measured, part by part."""

from dataclasses import asdict
from typing import Any

import torch

from groupsae.cost.counter import flop_counter
from groupsae.cost.model import FORMAT, Trained, Workload
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
    """Return the cost of the run and the saving of its groups, as plain values.

    Seconds are wall clock (on a GPU its own clock) of this run; of the distances, of the run that
    measured them, if they came from the cache. Those of per-layer training at equal tokens are
    worked out: the language model's are the same, and each SAE takes as long as one of this run.
    SAEs of several widths are stepped together, so their seconds are divided among the widths in
    proportion to the trial before the start, and to the rows that a token gives to each.
    """
    plan, work, cost = grouping.plan, grouping.work, grouping.cost
    activations, saes = seconds
    distances, validation = grouping.measurement.seconds, throughput.validation.seconds
    sizes, plain = suite.sizes_of(plan.members), suite.size(1.0)
    trial = grouping.step_seconds or dict.fromkeys([*sizes, plain], 1.0)
    rows = [data.rows_per_token(p.layers) for p in plan.members]
    steps = [trial[size] * count for size, count in zip(sizes, rows, strict=True)]
    unit = saes / sum(steps)
    seconds_of = {p.name: unit * step for p, step in zip(plan.members, steps, strict=True)}
    per_row = {size: unit * trial[size] for size in sizes}
    with_maps = {size.d_sae: each for size, each in per_row.items() if size.maps}
    per_sae = with_maps | {x.d_sae: each for x, each in per_row.items() if not x.maps}
    of_groups, of_layers = sum(steps[: len(plan.saes)]), work.layers_run * trial[plain]
    groups, per_layer = (activations + distances + unit * n for n in (of_groups, of_layers))
    trained = [Trained(s.d_sae, len(p.layers)) for s, p in zip(sizes, plan.members, strict=True)]
    lm_flops, distance_flops, sae_flops = _measured_flops(data, suite, work)
    parts: dict[str, tuple[int | None, int | None, float]] = {
        "activations": (work.tokens * work.activations, lm_flops, activations),
        "distances": (work.calibration + work.distances, distance_flops, distances),
        "saes": (work.saes(trained), sae_flops, saes),
        "validation": (None, None, validation),
    }
    if data.is_stored:
        parts["store"] = None, None, data.reader.fill_seconds
    parts["other"] = None, None, throughput.all.seconds - activations - saes - validation
    names = ("planned_flops", "measured_flops", "seconds")
    return {
        "format": FORMAT,
        "device": str(data.device),
        "threads": torch.get_num_threads(),
        "tokens": work.tokens,
        "num_saes": len(trained),
        "workload": asdict(work),
        # with one row per token
        "seconds_per_sae": {str(d_sae): each for d_sae, each in per_sae.items()},
        "seconds_of_maps": max((each - per_sae[n] for n, each in with_maps.items()), default=0.0),
        "parts": [
            {"part": part, **dict(zip(names, values, strict=True))}
            for part, values in parts.items()
        ],
        "per_layer": {"planned_flops": cost.total_per_layer, "seconds": per_layer},
        "saving": {
            "paper": cost.paper_saving,
            "paper_both_sides": cost.paper_saving_both_sides,
            "flops": cost.saving,
            "seconds": 1 - groups / per_layer,
        },
        "sharing": _sharing(plan, seconds_of, seconds, throughput.all.seconds - validation),
    }


def seconds_of_all(
    data: ActivationDataModule, throughput: Throughput, spread: bool
) -> tuple[float, float]:
    """Return the seconds of the language model's forwards and of the SAEs' steps.

    Where SAEs are spread over the processes: the mean over processes for the SAEs, the smallest
    for the model, because all but the slowest owner also wait for rows. Waiting is then in
    `other`, and all processes have to call this.
    """
    own = data.stopwatch.seconds, throughput.saes.seconds
    if not spread:
        return own
    activations, saes = zip(*gather(own), strict=True)
    return min(activations), sum(saes) / len(saes)


def _sharing(
    plan: GroupPlan, seconds_of: dict[str, float], seconds: tuple[float, float], wall: float
) -> dict[str, Any] | None:
    """Return the saving of training all groupings in one run against one run for each.

    `seconds` is the wall clock of training, the loop's own time included; `seconds_separately`
    counts the language model and the SAEs of each grouping only, so the factor is a lower bound.
    (Distances are measured once on both sides: they are cached.) `bound_seconds` is an upper
    bound for it: the language model's forward twice, and each SAE once.
    """
    if not plan.others:
        return None
    (activations, saes), found = seconds, groupings(plan)
    separate = sum(
        activations + sum(seconds_of[name] for name in set(grouping.sae_of_layer.values()))
        for grouping in found
    )
    return {
        "groupings": len(found),
        "seconds": wall,
        "seconds_separately": separate,
        "factor": separate / wall,
        "bound_seconds": 2 * activations + saes,
    }


def _measured_flops(
    data: ActivationDataModule, suite: GroupSAESuite, work: Workload
) -> tuple[int, int, int]:
    """Return the FLOPs that a counter sees in one block, times the blocks of the run.

    Of the language model in training, of the distances (with the forward over the calibration
    text) and of the SAEs, which run as in training, but without AuxK; nothing of them changes
    (eval: a running threshold stays). The SAEs are counted on a few rows and on the CPU, whose
    operators the counter knows; it does not see Triton programs.

    Where activations are read from a store, no language model runs in training or measuring: its
    count is zero, though the plan counts its forwards as if they were streamed.
    """
    # after fitting Lightning leaves the SAEs on the CPU; the language model is where it ran
    device, geometry = data.device, data.lm.geometry
    rows, every = data.first_rows(data.slots, 1), list(range(geometry.num_layers))
    angles = AngularDistance(num_layers=geometry.num_layers).to(device)
    with flop_counter() as lm:  # zero where rows are read from a store
        batch = rows()
    num_tokens = batch.acts.shape[1]
    with flop_counter() as calibration:
        if data.is_stored:  # values do not matter
            layers = torch.tensor(every, device=device)[:, None].expand(-1, num_tokens)
            acts = torch.ones(len(every), num_tokens, geometry.d_model, device=device)
            parts = [ActivationBatch([[x] for x in every], acts, layers, None)]
        else:
            tokens = next(iter(data.loader("train", 1)))[:1]
            parts = list(data.every_layer(tokens, every))
    with flop_counter() as distances:
        for part in parts:
            angles.update(part.acts, part.everywhere())
    sae_flops, held = 0.0, {member.name: member for member in suite.members()}
    for planned in suite.plan.members:
        # in place of one that another process holds, a fresh one: it costs the same
        member = (held.get(planned.name) or suite.make_member(planned)).cpu()
        acts, layers = batch.rows(planned.layers)
        few = slice(min(FEW, len(acts)))
        drawn = layers[few].cpu()
        x, sizes = member.by_layer(member.scaled(acts[few].cpu(), drawn), drawn, None)
        frame = GlobalBatch(torch.ones(()), member.dead_latents(0), sizes=sizes)
        with flop_counter() as sae, torch.enable_grad():
            output = member.sae.eval().forward(x, frame)
            torch.stack(list(output.losses.values())).sum().backward()
        member.zero_grad()
        sae_flops += sae.get_total_flops() * (len(acts) / max(1, len(x))) / num_tokens
    lm_flops, calibration_flops, distance_flops = (
        counter.get_total_flops() / num_tokens for counter in (lm, calibration, distances)
    )
    measuring = work.calibration_passes * calibration_flops + distance_flops
    return (
        round(work.tokens * lm_flops),
        round(work.calibration_tokens * measuring),
        round(work.tokens * sae_flops),
    )
