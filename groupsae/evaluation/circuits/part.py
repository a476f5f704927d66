"""The part `circuits` of an evaluation: which latents carry a task, and how much of it they carry.

For every task and grouping, with m(C) the mean metric over the test examples with circuit C only:

    faithfulness(N) = (m(C_N) - m(empty)) / (m(model) - m(empty))          1 is the model
    completeness(N) = (m(all but C_N) - m(empty)) / (m(model) - m(empty))  low is complete

C_N are the N latents with the largest effects; the empty circuit uses the same ablation and the
same errors. Intervals resample pairs; numerator and denominator are of one resample, and
differences between groupings are paired.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.circuits.areas import areas
from groupsae.evaluation.circuits.attribution import Effects, attribute
from groupsae.evaluation.circuits.examples import Batch, batches
from groupsae.evaluation.circuits.running import (
    Ablation,
    Circuit,
    Order,
    averaged,
    in_order,
    patched,
    run_circuit,
)
from groupsae.evaluation.circuits.tasks import Pair, Task, check_tasks, make_task
from groupsae.evaluation.intervals import Bootstrap, Interval, percentile_interval
from groupsae.evaluation.parts import Subject, chosen_groupings
from groupsae.grouping.groupings import Grouping
from groupsae.lm.splice import Splicer
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.suite.layer import LayerSAE

Samples = np.ndarray  # a value, then the same on each resample
LOWER = ("cmd", "completeness")  # metrics of which less is better
LEAST = {False: 1.0, True: 0.1}  # |m| that a model must reach: LD, or a difference of probability


class Circuits:
    """Circuits of latents for tasks whose answers are known.

    Args:
        tasks: names of shipped tasks (`tasks.yaml`), or files of pairs that end in .jsonl.
        groupings: names of the groupings to look at; "all"; or None for the chosen one and one SAE
            per layer.
        train_pairs: pairs to find circuits on, at most. Each serves in both directions.
        test_pairs: other pairs to test them on, at most.
        attribution: `ig_inputs`, `ig` or `attribution`: see `attribution.py`.
        steps: of the integrated gradients.
        select: `global`, the largest effects of all layers; `per_layer`, as many of each layer.
        ablation: what latents outside of the circuit become: their values for the other prompt
            (`patch`), their `mean` over prompts at each position, or `zero`.
        errors: what becomes of the SAEs' errors, several of `keep`, `none`, `circuit` and
            `ablate`: see `running.py`.
        curves: several of `faithfulness`, `completeness` and `random` (faithfulness of as many
            latents drawn at random among the active ones).
        fractions: sizes of the circuits, as fractions of the latents active on the task; with
            `per_layer` of all latents of a layer.
        completeness_fractions: the same for completeness; None: `fractions`.
        last_layer: also replace the last layer of the model.
        single_layers: also measure what is left with the SAE of one layer spliced in.
        gate: least accuracy of the model in both directions; other tasks are left out.
        shown: latents to list of each circuit.
        batch_size: prompts in one forward.
        seed: of pairs and random circuits.
        bootstrap: the arguments of `Bootstrap`.
    """

    name: ClassVar[str] = "circuits"

    def __init__(
        self,
        *,
        tasks: str | Sequence[str],
        groupings: str | Sequence[str] | None,
        train_pairs: int,
        test_pairs: int,
        attribution: str,
        steps: int,
        select: str,
        ablation: str,
        errors: Sequence[str],
        curves: Sequence[str],
        fractions: Sequence[float],
        completeness_fractions: Sequence[float] | None,
        last_layer: bool,
        single_layers: bool,
        gate: float,
        shown: int,
        batch_size: int,
        seed: int,
        bootstrap: Mapping[str, Any],
    ) -> None:
        self.tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        self.groupings, self.pairs = groupings, (train_pairs, test_pairs)
        self.attribution, self.steps, self.select = attribution, steps, select
        self.ablation, self.errors, self.curves = ablation, list(errors), list(curves)
        self.fractions = {kind: np.array(fractions) for kind in curves}
        if completeness_fractions is not None and "completeness" in curves:
            self.fractions["completeness"] = np.array(completeness_fractions)
        self.last_layer, self.single_layers = last_layer, single_layers
        self.gate, self.shown, self.batch_size, self.seed = gate, shown, batch_size, seed
        self.bootstrap = dict(bootstrap)
        check_tasks(self.tasks)

    def check(self, data: ActivationDataModule) -> None:
        """Raise UserError if a task cannot be made with the model's tokenizer."""
        self._made(data.lm.tokenizer(), data.packing.prepend_bos)

    def _made(self, tokenizer: Any, bos: bool) -> list[Task]:
        return [make_task(name, tokenizer, *self.pairs, self.seed, bos) for name in self.tasks]

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return areas of every grouping and task, curves, the best latents, and the gate.

        Raises:
            UserError: the model is no language model of one stack, no task passes the gate, or a
                grouping is unknown.
        """
        lm, watch = subject.lm, Stopwatch()
        if not lm.predicts or lm.start_token is not None:
            raise UserError("circuits need a language model that continues a prompt.")
        groupings = chosen_groupings(subject, self.groupings, "evaluation.circuits.groupings")
        saes = {grouping.name: self._saes(subject, grouping) for grouping in groupings}
        bos = bool(next(iter(subject.saes.values())).cfg.get("prepend_bos", False))
        tasks = self._made(subject.tokenizer(), bos)
        found: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("gate", "tasks", "curves", "layers", "latents")
        }
        samples: dict[tuple[str, str], dict[str, Samples]] = {}  # by grouping and task
        total = len(tasks) * (1 + len(groupings))
        with watch, token_progress("circuits", total, show=True) as advance:
            for number, task in enumerate(tasks):
                measured = _Measured(self, subject, task, number)
                found["gate"].append(measured.gate())
                if found["gate"][-1]["reason"] is None:
                    effects = measured.effects(saes.values())
                    for name, served in saes.items():
                        rows = measured.grouping(name, served, effects)
                        samples[name, task.name] = rows.pop("samples")
                        for table, lines in rows.items():
                            found[table] += lines
                        advance(1)
                advance(1)
        if not samples:
            reasons = "; ".join(f"{row['task']}: {row['reason']}" for row in found["gate"])
            raise UserError(
                f"this model does none of the tasks ({reasons}). Choose others by "
                "evaluation.circuits.tasks."
            )
        return {
            "groupings": self._groupings(groupings, samples),
            **found,
            "options": self._options(),
            "seconds": watch.seconds,
        }

    def _options(self) -> dict[str, Any]:
        kept = ("attribution", "steps", "select", "ablation", "last_layer", "seed", "bootstrap")
        train, test = self.pairs
        return {
            "train_pairs": train,
            "test_pairs": test,
            **{key: getattr(self, key) for key in kept},
        }

    def _saes(self, subject: Subject, grouping: Grouping) -> dict[int, LayerSAE]:
        layers = sorted(grouping.sae_of_layer if self.last_layer else grouping.grouped)
        return {x: subject.saes[grouping.sae_of_layer[x]][x] for x in layers}

    def _groupings(
        self,
        groupings: Sequence[Grouping],
        samples: Mapping[tuple[str, str], Mapping[str, Samples]],
    ) -> list[dict[str, Any]]:
        """Return the means over tasks, and what is lost against one SAE per layer, paired.

        A mean is over the tasks for which a metric is defined in all groupings.
        """
        tasks = list(dict.fromkeys(task for _, task in samples))
        shared = {
            metric: [t for t in tasks if all(metric in samples[g.name, t] for g in groupings)]
            for metric in dict.fromkeys(m for each in samples.values() for m in each)
        }

        def shown(each: Samples) -> Interval:
            return percentile_interval(each[0], each[1:], self.bootstrap["level"])

        means = {
            g.name: {
                metric: np.mean([samples[g.name, task][metric] for task in over], axis=0)
                for metric, over in shared.items()
                if over
            }
            for g in groupings
        }
        baseline = next((g.name for g in groupings if g.kind == "per_layer"), None)
        rows = []
        for grouping in groupings:
            mine = means[grouping.name]
            row: dict[str, Any] = {
                "grouping": grouping.name,
                "kind": grouping.kind,
                "num_groups": grouping.num_groups,
                "amad": None if grouping.partition is None else grouping.partition.amad,
                "tasks": len(tasks),
            }
            row |= {name: shown(each) for name, each in mine.items()}
            if baseline not in (None, grouping.name):
                for name, each in mine.items():
                    worse = each - means[str(baseline)][name]
                    worse = worse if name.startswith(LOWER) else -worse
                    row[f"{name}_lost"] = shown(worse)
            rows.append(row)
        return rows


class _Measured:
    """One task: its examples, and what the model and the groupings make of them."""

    def __init__(self, part: Circuits, subject: Subject, task: Task, number: int) -> None:
        self.part, self.subject, self.task, self.number = part, subject, task, number
        self.test = self._batches(task.test)
        drawn = part.bootstrap | {"seed": part.bootstrap["seed"] + number}  # tasks are independent
        self.bootstrap = Bootstrap(np.arange(2 * len(task.test)) // 2, **drawn)
        self.model = self._metric(
            batch.metric(
                subject.lm.run(
                    subject.lm.inputs(batch.clean, last_logits=True),
                    [],
                    lambda *_: None,
                    stop=False,
                ).logits
            ).cpu()
            for batch in self.test
        )

    def _batches(self, pairs: Sequence[Pair], sides: int = 2) -> list[Batch]:
        sae = next(iter(self.subject.saes.values()))
        return list(batches(pairs, self.part.batch_size, sae.device, sides))

    def _metric(self, parts: Iterable[Tensor]) -> np.ndarray:
        return in_order(self.test, list(parts)).numpy()

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
        """Return the effects of all SAEs, from one gradient pass.

        The means over steps are the same in both directions of a pair; only the gradient on the
        clean run is not.
        """
        part = self.part
        every = {(sae.group, sae.layer): sae for each in saes for sae in each.values()}
        sides = 2 if part.attribution == "attribution" else 1
        return attribute(
            self.subject.lm, self._batches(self.task.train, sides), every.values(),
            part.attribution, part.steps, self.subject.kept,
        )  # fmt: skip

    def grouping(
        self, name: str, saes: Mapping[int, LayerSAE], effects: Mapping[tuple[str, int], Effects]
    ) -> dict[str, Any]:
        """Return the rows of one grouping, and the samples of its metrics."""
        mine = {layer: effects[sae.group, layer] for layer, sae in saes.items()}
        ablations = self._ablations(saes)
        head = {"task": self.task.name, "grouping": name}
        rows: dict[str, Any] = {"tasks": [], "curves": [], "layers": [], "samples": {}}
        rows["latents"] = [head | each for each in self._latents(mine, saes)]
        for errors in self.part.errors:
            order = Order(mine, self.part.select, errors == "circuit")
            row, curves, samples = self._curves(saes, order, mine, ablations, errors)
            rows["tasks"].append(head | {"errors": errors, "active": order.active} | row)
            rows["curves"] += [head | {"errors": errors} | each for each in curves]
            rows["samples"] |= {f"{metric}_{errors}": each for metric, each in samples.items()}
        if "full_none" in rows["samples"]:
            rows["samples"]["ld_recovered"] = rows["samples"]["full_none"]
        rows["samples"] = {k: v for k, v in rows["samples"].items() if not k.startswith("full_")}
        if self.part.single_layers:
            kept = self._single_layers(saes)
            rows["samples"]["single_layers"] = np.mean(list(kept.values()), axis=0)
            rows["layers"] = [
                head | {"layer": x, "sae": saes[x].group, "ld_kept": self._interval(each)}
                for x, each in kept.items()
            ]
        return rows

    def _ablations(self, saes: Mapping[int, LayerSAE]) -> list[Ablation]:
        """Return the values of ablated latents for each batch of the test."""
        if self.part.ablation == "patch":
            return [patched(self.subject, batch, saes) for batch in self.test]
        if self.part.ablation == "zero":
            return [Ablation(None, None)] * len(self.test)
        train = self._batches(self.task.train)
        return [averaged(self.subject, train, saes, self.task.name)] * len(self.test)

    def _curves(
        self,
        saes: Mapping[int, LayerSAE],
        order: Order,
        effects: Mapping[int, Effects],
        ablations: Sequence[Ablation],
        errors: str,
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Samples]]:
        """Return areas, points, and the samples of each area, for one way to treat errors."""

        def run(circuit: Circuit) -> np.ndarray:
            return self._metric(
                run_circuit(self.subject, batch, saes, circuit, ablation, errors)
                for batch, ablation in zip(self.test, ablations, strict=True)
            )

        every = order.first(1 + sum(order.widths) + len(saes))
        empty, full = run(every.without()), run(every)
        scale = self._mean(self.model - empty)
        row: dict[str, Any] = {
            "metric_model": self._interval(self._mean(self.model)),
            "metric_empty": self._interval(self._mean(empty)),
            "metric_full": self._interval(self._mean(full)),
            "reason": None,
        }
        interval = self._interval(scale)
        if interval["low"] is None or interval["low"] <= 0:
            row["reason"] = (
                f"m(model) - m(empty) is {scale[0]:.3g}: not clearly above 0, so no ratio is "
                "defined"
            )
            return row, [], {}
        samples: dict[str, Samples] = {"full": self._mean(full - empty) / scale}
        row["full"] = self._interval(samples["full"])
        curves = []
        for kind, fractions in self.part.fractions.items():
            if kind == "random":
                generator = torch.Generator().manual_seed(self.part.seed + self.number)
                order = Order(effects, self.part.select, errors == "circuit", generator)
            sizes = [order.size(float(fraction)) for fraction in fractions]
            points = []
            for fraction, size in zip(fractions, sizes, strict=True):
                circuit = (
                    every if fraction >= 1 and order.select == "global" else order.first(size)
                )
                circuit = circuit.without() if kind == "completeness" else circuit
                points.append(self._mean(run(circuit) - empty) / scale)
                curves.append(
                    {
                        "kind": kind,
                        "fraction": float(fraction),
                        "latents": size * (1 if order.select == "global" else len(saes)),
                        "ratio": self._interval(points[-1]),
                    }
                )
            for metric, each in areas(np.array(points), np.array(sizes), fractions).items():
                named = metric if kind == "faithfulness" and metric != "area" else None
                named = kind if metric == "area" else named
                named = f"{kind}_linear" if metric == "linear" else named
                if named is not None:
                    samples[named], row[named] = each, self._interval(each)
        return row, curves, samples

    def _single_layers(self, saes: Mapping[int, LayerSAE]) -> dict[int, Samples]:
        """Return the share of the model's metric that is left with one layer spliced."""
        splicer, parts = Splicer(self.subject.lm), {layer: [] for layer in saes}  # type: ignore[var-annotated]
        for batch in self.test:
            _, acts = splicer.clean(batch.clean, saes)
            for layer, sae in saes.items():
                x = acts[layer]
                keep, new = self.subject.kept(batch.clean, x), sae(x).to(x)
                new = new if keep is None else torch.where(keep[..., None], new, x)
                parts[layer].append(batch.metric(splicer.resume(layer, new)).cpu())
        model = self._mean(self.model)
        return {layer: self._mean(self._metric(each)) / model for layer, each in parts.items()}

    def _latents(
        self, effects: Mapping[int, Effects], saes: Mapping[int, LayerSAE]
    ) -> list[dict[str, Any]]:
        """Return the latents with the largest effects; a negative effect supports the answer."""
        examples = len(self.task.train) * (2 if self.part.attribution == "attribution" else 1)
        found: list[dict[str, Any]] = [
            {
                "layer": layer,
                "sae": saes[layer].group,
                "latent": int(latent),
                "effect": float(each.sums[latent]) / examples,
            }
            for layer, each in effects.items()
            for latent in each.sums.abs().argsort(descending=True)[: self.part.shown]
        ]
        return sorted(found, key=lambda row: -abs(row["effect"]))[: self.part.shown]

    def _mean(self, metric: np.ndarray) -> Samples:
        ones = np.ones(len(metric))
        return np.concatenate([[metric.mean()], self.bootstrap.ratio(metric, ones)])

    def _interval(self, samples: Samples) -> Interval:
        return self.bootstrap.interval(float(samples[0]), samples[1:])
