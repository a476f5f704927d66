"""The part `circuits` of an evaluation: which latents carry a task, and how much of it they carry.

For every task and grouping, with m(C) the mean metric over the test examples with circuit C only:

    faithfulness(N) = (m(C_N) - m(empty)) / (m(model) - m(empty))          1 is the model
    completeness(N) = (m(all but C_N) - m(empty)) / (m(model) - m(empty))  low is complete
    LD recovered = F of all latents without errors,  LD left = m(all latents) / m(model)

C_N are the N latents with the largest effects; the empty circuit uses the same ablation and the
same errors. Intervals resample pairs; numerator and denominator are of one resample, and
differences between groupings are paired.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.data.filters import replaced
from groupsae.evaluation.circuits.areas import areas
from groupsae.evaluation.circuits.attribution import Effects, attribute
from groupsae.evaluation.circuits.examples import Batch, batches
from groupsae.evaluation.circuits.running import (
    Ablation,
    Circuit,
    Order,
    averaged,
    patched,
    run_circuit,
    without,
)
from groupsae.evaluation.circuits.tasks import Pair, Task, TooFewPairs, check_tasks, make_task
from groupsae.evaluation.intervals import (
    Bootstrap,
    Estimate,
    interval_of,
    table_of_groupings,
)
from groupsae.evaluation.parts import Subject, chosen_groupings
from groupsae.grouping.groupings import Grouping
from groupsae.lm.splice import Splicer
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.suite.layer import LayerSAE

LOWER = ("cmd", "completeness")  # metrics of which less is better
OPTIONS = (  # that the results name
    "train_pairs", "test_pairs", "attribution", "steps", "select", "ablation", "last_layer",
    "seed", "bootstrap",
)  # fmt: skip
LEAST = {False: 1.0, True: 0.1}  # |m| that a model must reach: LD, or a difference of probability


@dataclass(kw_only=True)
class Circuits:
    """Circuits of latents for tasks whose answers are known.

    The defaults are those of `conf/evaluation/circuits.yaml`, which explains the others.

    Args:
        tasks: names of shipped tasks (`tasks.yaml`), or files of pairs that end in .jsonl.
        groupings: names of groupings, also "all"; None: the chosen one and one SAE per layer.
        attribution: `ig_inputs`, `ig` or `attribution`: see `attribution.py`.
        errors: several of `keep` and `none`: see `running.py`.
        fractions: sizes of circuits, as shares of the latents active on the task; with
            `select="per_layer"` of all latents of a layer.
        completeness_fractions: those of the curve of completeness; None: `fractions`.
        bootstrap: the arguments of `Bootstrap`.
    """

    name: ClassVar[str] = "circuits"
    tasks: Sequence[str]
    groupings: Sequence[str] | None
    train_pairs: int
    test_pairs: int
    attribution: str
    steps: int
    select: str
    ablation: str
    errors: Sequence[str]
    curves: Sequence[str]
    fractions: Sequence[float]
    completeness_fractions: Sequence[float] | None
    last_layer: bool
    single_layers: bool
    gate: float
    shown: int
    batch_size: int
    seed: int
    bootstrap: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raise UserError if there is no such task."""
        check_tasks(self.tasks)

    def check(self, data: ActivationDataModule) -> None:
        """Raise UserError if no task can be made with the model's tokenizer."""
        self._made(data.lm.tokenizer(), data.packing.prepend_bos)

    def _made(self, tokenizer: Any, bos: bool) -> tuple[list[Task], dict[str, str]]:
        """Return the tasks that have enough pairs, and why others have not."""
        made, lacking = [], {}
        for name in self.tasks:
            try:
                counts = self.train_pairs, self.test_pairs
                made.append(make_task(name, tokenizer, *counts, self.seed, bos))
            except TooFewPairs as error:
                lacking[name] = str(error)
        if not made:
            raise UserError("; ".join(f"the task {name}: {why}" for name, why in lacking.items()))
        return made, lacking

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return areas of every grouping and task, curves, the best latents, and the gate.

        Raises:
            UserError: the model is no language model of one stack, no task passes the gate, or a
                grouping is unknown.
        """
        lm, watch = subject.lm, Stopwatch()
        if not lm.predicts or lm.start_token is not None:
            raise UserError("circuits need a language model that continues a prompt.")
        key = "evaluation.circuits.groupings"
        groupings = chosen_groupings(subject.groupings, self.groupings, key)
        saes = {grouping.name: self._saes(subject, grouping) for grouping in groupings}
        bos = bool(next(iter(subject.saes.values())).cfg.get("prepend_bos", False))
        tasks, lacking = self._made(subject.tokenizer(), bos)
        found: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("gate", "tasks", "curves", "layers", "latents")
        }
        # by grouping, task and metric
        estimates: dict[str, dict[str, dict[str, Estimate]]] = {name: {} for name in saes}
        sizes = [sum(2 * len(p.prompts[0]) for p in task.train + task.test) for task in tasks]
        with watch, token_progress("circuits", sum(sizes) * len(saes), show=True) as advance:
            for number, (task, size) in enumerate(zip(tasks, sizes, strict=True)):
                measured = _Measured(self, subject, task, number)
                found["gate"].append(measured.gate())
                if found["gate"][-1]["reason"] is not None:
                    advance(size * len(saes))
                else:
                    effects = measured.effects(saes.values())
                    for name, served in saes.items():
                        rows, estimates[name][task.name] = measured.grouping(name, served, effects)
                        for table, lines in rows.items():
                            found[table] += lines
                        advance(size)
        found["gate"] += [{"task": name, "reason": why} for name, why in lacking.items()]
        if all(row["reason"] for row in found["gate"]):
            reasons = "; ".join(f"{row['task']}: {row['reason']}" for row in found["gate"])
            raise UserError(
                f"this model does none of the tasks ({reasons}). Choose others by "
                "evaluation.circuits.tasks."
            )
        return {
            "groupings": self._groupings(groupings, estimates),
            **found,
            "options": {name: getattr(self, name) for name in OPTIONS},
            "seconds": watch.seconds,
        }

    def _saes(self, subject: Subject, grouping: Grouping) -> dict[int, LayerSAE]:
        layers = sorted(grouping.sae_of_layer if self.last_layer else grouping.grouped)
        return {x: subject.saes[grouping.sae_of_layer[x]][x] for x in layers}

    def _groupings(
        self,
        groupings: Sequence[Grouping],
        estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    ) -> list[dict[str, Any]]:
        """Return the means over tasks, each over those for which all groupings have the metric."""
        every = [found for by_task in estimates.values() for found in by_task.values()]
        means: dict[str, dict[str, Estimate]] = {name: {} for name in estimates}
        for metric in dict.fromkeys(metric for found in every for metric in found):
            lacking = {
                task
                for by_task in estimates.values()
                for task, found in by_task.items()
                if metric not in found
            }
            for name, by_task in estimates.items():
                values = [found[metric] for task, found in by_task.items() if task not in lacking]
                if values:
                    means[name][metric] = np.mean(values, axis=0)
        show = partial(interval_of, level=self.bootstrap["level"])
        less = {metric: metric.startswith(LOWER) for found in means.values() for metric in found}
        rows = table_of_groupings(groupings, means, show, less)
        for row, grouping in zip(rows, groupings, strict=True):
            row["kind"], row["tasks"] = grouping.kind, len(estimates[grouping.name])
            row["amad"] = None if grouping.partition is None else grouping.partition.amad
        return rows


class _Measured:
    """One task: its examples, and what the model and the groupings make of them."""

    def __init__(self, part: Circuits, subject: Subject, task: Task, number: int) -> None:
        self.part, self.subject, self.task, self.number = part, subject, task, number
        self.test = self._batches(task.test)
        drawn = {**part.bootstrap, "seed": part.bootstrap["seed"] + number}  # tasks: independent
        self.bootstrap = Bootstrap(np.arange(2 * len(task.test)) // 2, **drawn)
        self.model = self._metric(
            run_circuit(subject, batch, {}, {}, {}, "keep") for batch in self.test
        )

    def _batches(self, pairs: Sequence[Pair], sides: int = 2) -> list[Batch]:
        sae = next(iter(self.subject.saes.values()))
        return list(batches(pairs, self.part.batch_size, sae.device, sides))

    def _metric(self, parts: Iterable[Tensor]) -> np.ndarray:
        """Return the metrics of all examples, in the order of the task."""
        order = torch.cat([batch.numbers for batch in self.test]).argsort()
        return torch.cat(list(parts))[order].numpy()

    def gate(self) -> dict[str, Any]:
        """Return how well the model does the task; `reason` is None if it passes."""
        sides = [self.model[side::2] for side in (0, 1)]
        accuracy = [float((side > 0).mean()) for side in sides]
        size = [float(side.mean()) for side in sides]
        least = LEAST[self.test[0].of_sets]
        reason = None
        if min(accuracy) < self.part.gate:
            reason = f"accuracy {min(accuracy):.2f} is below {self.part.gate:g}"
        elif min(size) < least:
            reason = f"the mean metric {min(size):.2f} is below {least:g}"
        return {
            "task": self.task.name,
            "pairs": len(self.task.test),
            "accuracy": accuracy[0],
            "accuracy_swapped": accuracy[1],
            "metric": size[0],
            "metric_swapped": size[1],
            "reason": reason,
        }

    def effects(self, saes: Iterable[Mapping[int, LayerSAE]]) -> dict[tuple[str, int], Effects]:
        """Return the effects of all SAEs, from one gradient pass."""
        part, examples = self.part, self._batches(self.task.train, sides=1)
        every = [sae for each in saes for sae in each.values()]
        how = (part.attribution, part.steps, self.subject.kept)
        return attribute(self.subject.lm, examples, every, *how)

    def grouping(
        self, name: str, saes: Mapping[int, LayerSAE], effects: Mapping[tuple[str, int], Effects]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Estimate]]:
        """Return the rows of one grouping by table, and the estimates of its metrics."""
        mine = {layer: effects[sae.group, layer] for layer, sae in saes.items()}
        ablations, order = self._ablations(saes), Order(mine, self.part.select)
        head = {"task": self.task.name, "grouping": name}
        rows: dict[str, list[dict[str, Any]]] = {
            "tasks": [],
            "curves": [],
            "latents": [head | each for each in self._latents(mine, saes)],
        }
        estimates: dict[str, Estimate] = {}
        for errors in self.part.errors:
            row, curves, found = self._curves(saes, order, mine, ablations, errors)
            of_errors = head | {"errors": errors}
            rows["tasks"].append(of_errors | {"active": order.active} | row)
            rows["curves"] += [of_errors | each for each in curves]
            of_all = {f"ld_{name}": found.pop(name) for name in ("recovered", "left") if found}
            estimates |= {f"{metric}_{errors}": each for metric, each in found.items()}
            estimates |= of_all if errors == "none" else {}
        if self.part.single_layers:
            kept = self._single_layers(saes)
            estimates["single_layers"] = np.mean(list(kept.values()), axis=0)
            rows["layers"] = [
                head | {"layer": x, "sae": saes[x].group, "ld_kept": self.bootstrap.interval(each)}
                for x, each in kept.items()
            ]
        return rows, estimates

    def _ablations(self, saes: Mapping[int, LayerSAE]) -> list[Ablation]:
        """Return the values of ablated latents for each batch of the test."""
        if self.part.ablation == "patch":
            return [patched(self.subject, batch, saes) for batch in self.test]
        if self.part.ablation == "zero":
            zero = {layer: torch.zeros((), device=sae.device) for layer, sae in saes.items()}
            return [zero] * len(self.test)
        train = self._batches(self.task.train)
        return [averaged(self.subject, train, saes, self.task.name)] * len(self.test)

    def _curves(
        self,
        saes: Mapping[int, LayerSAE],
        order: Order,
        effects: Mapping[int, Effects],
        ablations: Sequence[Ablation],
        errors: str,
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Estimate]]:
        """Return areas, points, and the estimate of each area, for one way to treat errors."""

        def run(circuit: Circuit) -> np.ndarray:
            return self._metric(
                run_circuit(self.subject, batch, saes, circuit, ablation, errors)
                for batch, ablation in zip(self.test, ablations, strict=True)
            )

        every, mean = order.everything(), self.bootstrap.estimate
        empty, full = run(without(every)), run(every)
        scale = mean(self.model - empty)
        row: dict[str, Any] = {
            "metric_model": self.bootstrap.interval(mean(self.model)),
            "metric_empty": self.bootstrap.interval(mean(empty)),
            "metric_full": self.bootstrap.interval(mean(full)),
            "reason": None,
        }
        interval = self.bootstrap.interval(scale)
        if interval["low"] is None or interval["low"] <= 0:
            row["reason"] = (
                f"m(model) - m(empty) is {scale[0]:.3g}: not clearly above 0, so no ratio is "
                "defined"
            )
            return row, [], {}
        found: dict[str, Estimate] = {
            "recovered": mean(full - empty) / scale,
            "left": mean(full) / mean(self.model),
        }
        curves = []
        for kind in self.part.curves:
            fractions = np.array(self.part.fractions)
            if kind == "completeness" and self.part.completeness_fractions is not None:
                fractions = np.array(self.part.completeness_fractions)
            chosen = order
            if kind == "random":
                generator = torch.Generator().manual_seed(self.part.seed + self.number)
                chosen = Order(effects, self.part.select, generator)
            sizes = [order.size(float(fraction)) for fraction in fractions]
            points = []
            for fraction, size in zip(fractions, sizes, strict=True):
                full_size = fraction >= 1 and order.select == "global"
                circuit = every if full_size else chosen.first(size)
                circuit = without(circuit) if kind == "completeness" else circuit
                points.append(mean(run(circuit) - empty) / scale)
                curves.append(
                    {
                        "kind": kind,
                        "fraction": float(fraction),
                        "latents": size * (1 if order.select == "global" else len(saes)),
                        "ratio": self.bootstrap.interval(points[-1]),
                    }
                )
            measured = areas(np.array(points), np.array(sizes), fractions)
            found |= {kind: measured["area"], f"{kind}_linear": measured["linear"]}
            if kind == "faithfulness":
                found |= {metric: measured[metric] for metric in ("cpr", "cmd")}
        row |= {name: self.bootstrap.interval(each) for name, each in found.items()}
        return row, curves, found

    def _single_layers(self, saes: Mapping[int, LayerSAE]) -> dict[int, Estimate]:
        """Return the share of the model's metric that is left with one layer spliced."""
        splicer = Splicer(self.subject.lm)
        parts: dict[int, list[Tensor]] = {layer: [] for layer in saes}
        for batch in self.test:
            _, acts = splicer.clean(batch.clean, saes)
            for layer, sae in saes.items():
                x = acts[layer]
                new = replaced(x, sae(x), self.subject.kept(batch.clean, x))
                parts[layer].append(batch.metric(splicer.resume(layer, new)).cpu())
        model = self.bootstrap.estimate(self.model)
        return {
            layer: self.bootstrap.estimate(self._metric(each)) / model
            for layer, each in parts.items()
        }

    def _latents(
        self, effects: Mapping[int, Effects], saes: Mapping[int, LayerSAE]
    ) -> list[dict[str, Any]]:
        """Return the latents with the largest effects; a negative effect supports the answer."""
        found: list[dict[str, Any]] = [
            {
                "layer": layer,
                "sae": saes[layer].group,
                "latent": int(latent),
                "effect": float(each.sums[latent]) / len(self.task.train),
            }
            for layer, each in effects.items()
            for latent in each.sums.abs().argsort(descending=True)[: self.part.shown]
        ]
        return sorted(found, key=lambda row: -abs(row["effect"]))[: self.part.shown]
