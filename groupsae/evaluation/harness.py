"""The part `harness` of an evaluation: benchmarks of lm-evaluation-harness with SAEs spliced in.

The model runs every task unchanged, with each SAE spliced in at each of its layers, and with all
layers of each grouping spliced together. A task that the unchanged model cannot do shows nothing
about the SAEs: damage moves scores towards chance, up as well as down. So differences are given
only where the unchanged model is clearly better than chance.
"""

import copy
import difflib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from groupsae.data.activations import ActivationDataModule
from groupsae.data.filters import TokenFilter, both, replaced
from groupsae.evaluation.intervals import Bootstrap, Estimate, per_layer
from groupsae.evaluation.parts import Subject
from groupsae.evaluation.tasks import SHIPPED
from groupsae.grouping.groupings import Grouping
from groupsae.lm.attached import AttachedLM, Reading
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.runtime.retry import hub_is_unknown, one_line
from groupsae.suite.layer import LayerSAE

SHIPPED_DOCUMENTS = 200  # of a shipped task without a limit
KNOWS_NOTHING = 8.0  # bits per byte

Condition = tuple[str, int | None]  # an SAE alone on a layer; or a grouping, on all of its layers
Key = tuple[str, str]  # a task and a metric
# by a grouping: all layers together, mean over the layers alone; both minus those of per layer
LOSSES = ("lost_together", "lost", "against_together", "against_alone")


@dataclass(kw_only=True)
class Harness:
    """Benchmarks with and without SAEs.

    The defaults are those of `conf/evaluation/harness.yaml`, which explains the others.

    Args:
        tasks: `code`, `arithmetic`, `multilingual`, and names of tasks in `folder` or of lm-eval.
        folder: a folder with the user's own task files, as lm-eval reads them; None: none.
        limit: most documents of a task; None: all, and 200 of a shipped task.
        num_fewshot: examples before each question; None: as the task has it.
        bootstrap: the arguments of `Bootstrap`, which resamples the documents of a task.
    """

    name: ClassVar[str] = "harness"
    tasks: Sequence[str]
    folder: str | None
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    layers: bool
    seed: int
    bootstrap: Mapping[str, Any]

    def check(self, data: ActivationDataModule) -> None:
        """Raise UserError if lm-eval is not installed, or does not know a task."""
        self._manager  # noqa: B018

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return the scores of every task, unchanged and spliced, and their paired differences.

        Raises:
            UserError: the model is no decoder with a head, or a task's data cannot be had.
        """
        if not subject.lm.predicts or subject.lm.start_token is not None:
            raise UserError(
                "evaluation=harness needs a decoder that predicts the next token: this model is "
                "an encoder, has one, or comes without its head."
            )
        manager = self._manager
        lm = spliced_lm(subject, self.batch_size)
        tasks = self._loaded(manager, next(iter(subject.saes.values())).cfg, lm.max_length)
        conditions: dict[Condition, Mapping[int, str]] = {}
        if self.layers:
            pairs = [(name, x) for name, suite in subject.saes.items() for x in suite.layers]
            conditions = {(name, layer): {layer: name} for name, layer in pairs}
        conditions |= {(each.name, None): each.sae_of_layer for each in subject.groupings}
        with token_progress("running tasks on the unchanged model", None) as advance:
            counts: list[int] = []

            def count(tokens: int) -> None:
                counts.append(tokens)
                advance(tokens)

            lm.read = count
            clean, warned = self._run(lm, tasks, {})
        if warned:
            warnings.warn(f"lm-eval: {warned[0].getMessage()} ({len(warned)} such)", stacklevel=2)
        spliced: dict[Condition, dict[Key, Scores]] = {}
        title = f"running tasks with SAEs spliced in, {len(conditions)} times"
        with token_progress(title, sum(counts) * len(conditions)) as advance:
            lm.read = advance
            for condition, owner in conditions.items():
                spliced[condition] = self._run(lm, tasks, owner)[0]
        return self._results(subject, clean, spliced)

    # ---- tasks --------------------------------------------------------------------------------

    @cached_property
    def _manager(self) -> Any:
        """Return lm-eval's task manager. That of its own 14,000 tasks takes long to make."""
        missing = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
        if missing:
            raise UserError(
                f"evaluation=harness needs {' and '.join(missing)}, not installed here: pip "
                "install 'groupsae[downstream]'"
            )
        if self.folder is not None and not Path(self.folder).is_dir():
            raise UserError(f"evaluation.harness.folder={self.folder} is no folder.")
        named = set(self.tasks) - set(SHIPPED)
        with _quiet():
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=self.folder, include_defaults=False)
            if not named <= set(manager.all_tasks):
                if hub_is_unknown():  # for libraries that are imported from now on
                    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
                manager = TaskManager(include_path=self.folder)
        known = [*SHIPPED, *manager.all_tasks]
        for name in sorted(named - set(known)):
            near = ", ".join(difflib.get_close_matches(name, known, n=5)) or ", ".join(SHIPPED)
            raise UserError(f"evaluation.harness.tasks: there is no task {name}. Near: {near}.")
        return manager

    def _loaded(self, manager: Any, trained: Mapping[str, Any], longest: int) -> dict[str, Any]:
        """Return all tasks by name, with their data."""
        stream, most = trained.get("stream") or {}, self.limit or SHIPPED_DOCUMENTS
        found: dict[str, Any] = {}
        for name in self.tasks:
            specs = SHIPPED[name](stream, most, self.seed) if name in SHIPPED else [name]
            try:
                with _quiet():
                    found |= manager.load(specs)["tasks"]
            except (OSError, ImportError, RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    f"task {name} cannot be loaded ({one_line(error)}). Its data is read from the "
                    "Hub, or from the Hub's cache; code and arithmetic need no network."
                ) from error
        for name, task in found.items():
            most = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)
            if task.OUTPUT_TYPE == "generate_until" and most >= longest:
                raise UserError(
                    f"task {name} generates {most} tokens, but this model reads {longest} in all."
                )
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"task {name} runs the code that a model writes, which this command does not: "
                    "the task code scores solutions by their likelihood."
                )
            if self.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.seed)
        return found

    def _run(
        self, lm: Any, tasks: Mapping[str, Any], owner: Mapping[int, str]
    ) -> "tuple[dict[Key, Scores], list[logging.LogRecord]]":
        """Return the scores of all tasks with these layers spliced, and lm-eval's warnings."""
        from lm_eval.evaluator import evaluate

        lm.owner = owner
        with _quiet() as warned:
            found = evaluate(
                lm, {"tasks": tasks, "groups": {}}, limit=self.limit, bootstrap_iters=0
            )
        scores = {}
        for name, samples in found["samples"].items():
            for filtered in dict.fromkeys(each["filter"] for each in samples):
                rows = sorted(
                    (each for each in samples if each["filter"] == filtered),
                    key=lambda each: each["doc_id"],
                )
                for metric, larger in tasks[name].higher_is_better().items():
                    if (read := scores_of(tasks[name], metric, larger, rows)) is not None:
                        shown = metric if filtered == "none" else f"{metric}, {filtered}"
                        scores[name, shown] = read
        return scores, warned

    # ---- results ------------------------------------------------------------------------------

    def _results(
        self,
        subject: Subject,
        clean: "Mapping[Key, Scores]",
        spliced: "Mapping[Condition, Mapping[Key, Scores]]",
    ) -> dict[str, Any]:
        tasks, conditions, compared = [], [], []
        groupings: dict[str, dict[str, Any]] = {
            each.name: {"grouping": each.name, "num_groups": each.num_groups}
            for each in subject.groupings
        }
        for (task, metric), scores in clean.items():
            named, bootstrap = {"task": task, "metric": metric}, scores.bootstrap(self.bootstrap)
            show, unchanged = bootstrap.interval, scores.estimate(bootstrap)
            above = show(scores.sign * (unchanged - scores.chance))
            able = (above["low"] or 0.0) > 0
            tasks.append(
                {
                    **named,
                    "documents": bootstrap.documents,
                    "clean": show(unchanged),
                    "chance": scores.chance,
                    "above_chance": above,
                    "interpreted": able,
                }
            )
            lost: dict[Condition, Estimate] = {}
            for (name, layer), found in spliced.items():
                value = found[task, metric].estimate(bootstrap)
                lost[name, layer] = scores.sign * (unchanged - value)
                where: dict[str, Any] = {"spliced": name, "layer": layer, "value": show(value)}
                if able:
                    where["lost"] = show(lost[name, layer])
                conditions.append(named | where)
            if able:
                for grouping, figures in _over_groupings(subject.groupings, lost).items():
                    row = {figure: show(estimate) for figure, estimate in figures.items()}
                    compared.append(groupings[grouping] | named | row)
        for each in compared:
            groupings[each["grouping"]] |= {
                f"{figure}_{each['task']}_{each['metric']}": each[figure]
                for figure in LOSSES if figure in each
            }  # fmt: skip
        return {
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "bootstrap": self.bootstrap,
            "groupings": list(groupings.values()),
            "tasks": tasks,
            "compared": compared,
            "conditions": conditions,
        }


def _over_groupings(
    groupings: Sequence[Grouping], lost: Mapping[Condition, Estimate]
) -> dict[str, dict[str, Estimate]]:
    """Return `LOSSES` of each grouping, from the losses of all conditions."""
    found = {each.name: {"lost_together": lost[each.name, None]} for each in groupings}
    if len(lost) > len(groupings):  # each layer alone, too
        for each in groupings:
            alone = [lost[each.sae_of_layer[layer], layer] for layer in each.grouped]
            found[each.name]["lost"] = np.mean(alone, axis=0)
    if (baseline := per_layer(groupings)) is not None:
        theirs = found[baseline.name]
        for row in found.values():
            if row is not theirs:
                row["against_together"] = row["lost_together"] - theirs["lost_together"]
                if "lost" in row:
                    row["against_alone"] = row["lost"] - theirs["lost"]
    return found


class Scores(NamedTuple):
    """What each document of a task adds to a metric, sum(top) / sum(bottom)."""

    top: np.ndarray
    bottom: np.ndarray
    text: list[Any]  # what it was made from: such documents are resampled together
    chance: float  # the score of guessing
    sign: int  # 1 if larger is better, otherwise -1

    def bootstrap(self, arguments: Mapping[str, Any]) -> Bootstrap:
        """Return the resamples of the task's documents."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(self.text))}
        return Bootstrap(np.array([numbers[text] for text in self.text]), **arguments)

    def estimate(self, bootstrap: Bootstrap) -> Estimate:
        """Return the metric on all documents, then on each resample."""
        return bootstrap.estimate(self.top, self.bottom)


def scores_of(
    task: Any, metric: str, larger: bool, samples: Sequence[Mapping[str, Any]]
) -> Scores | None:
    """Return what the documents add to a metric of lm-eval; None if it is no mean over them.

    Guessing gives 1 / the number of choices in an `acc`, 8 bits per byte, and 0 in other metrics.
    """
    values = [each.get(metric) for each in samples]
    text = [each["doc"].get("document") or number for number, each in enumerate(samples)]
    if metric == "bits_per_byte":
        top, bottom = np.array(values, dtype=float).T
        return Scores(-top / math.log(2), bottom, text, KNOWS_NOTHING, -1)
    if metric.endswith("perplexity") or not all(isinstance(v, Real) for v in values):
        return None
    chance = 0.0
    if metric.startswith("acc") and task.OUTPUT_TYPE == "multiple_choice":
        chance = float(np.mean([1 / len(task.doc_to_choice(each["doc"])) for each in samples]))
    return Scores(
        np.array(values, dtype=float), np.ones(len(values)), text, chance, 1 if larger else -1
    )


# ---- the model ----------------------------------------------------------------------------------


def spliced_lm(subject: Subject, batch_size: int) -> Any:
    """Return the language model as lm-eval runs it, with a variable set of layers spliced.

    Its `owner` has the layers, each with the name of its SAE; `read` is called with the number of
    tokens of every forward. Hooks exist during a forward only. Positions that training left out
    (special tokens, first positions, extreme norms) keep their activations.
    """
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(subject.tokenizer())  # it is given a padding token, and
    tokenizer.model_max_length = sys.maxsize  # lm-eval itself makes windows of the context
    suite = next(iter(subject.saes.values()))
    filters = TokenFilter.recorded(suite.cfg, tokenizer.all_special_ids, None)
    model = subject.lm.model
    attached = AttachedLM(model, suite.cfg, suite.d_model, max(suite.layers))

    class SplicedLM(HFLM):
        owner: Mapping[int, str] = {}
        read: Callable[[int], object] = print

        @contextmanager
        def spliced(self) -> Iterator[None]:
            saes = {layer: subject.saes[name][layer] for layer, name in self.owner.items()}
            if not saes:
                yield
                return
            with attached.hooked(saes, _splicing(saes, filters), None):
                yield

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with self.spliced():
                logits: Tensor = super()._model_call(inps, *args, **kwargs)
            self.read(inps.numel())
            return logits

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad(), self.spliced():
                tokens: Tensor = super()._model_generate(context, *args, **kwargs)
            self.read(tokens.numel())
            return tokens

        @property
        def max_gen_toks(self) -> int:
            return min(256, self.max_length // 2)

    # the median of the norms of a text must not include those of padding
    size = batch_size if filters.max_norm_ratio is None else 1
    with _quiet():
        return SplicedLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=attached.context
        )


def _splicing(saes: Mapping[int, LayerSAE], filters: TokenFilter) -> Any:
    first, places = torch.zeros(0), torch.zeros(0)  # of this forward
    read: Reading | None = None

    def visit(layer: int, acts: Tensor, reading: Reading | None) -> Tensor:
        nonlocal first, places, read
        sae, rows = saes[layer], acts.flatten(0, 1)
        keep = filters.activations(acts)
        if reading is None or reading.tokens is None:
            x_hat = sae(rows.to(sae.device))
        else:
            if reading is not read:
                read, (first, places) = reading, distinct(reading.tokens, reading.past)
            skipped = max(0, filters.skip_positions - reading.past)
            keep = both(replace(filters, skip_positions=skipped).tokens(reading.tokens), keep)
            x_hat = sae(rows[first].to(sae.device))[places]
        return replaced(acts, x_hat.view_as(acts), keep)

    return visit


def distinct(
    tokens: Int[Tensor, "text pos"], past: int = 0
) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " place"]]:
    """Return where texts read something for the first time, and its number at each place.

    Where texts begin alike, as the choices of one question do, they have the same activations.
    Places are numbered text by text; with others before them in a cache, all are different.

    >>> first, places = distinct(torch.tensor([[5, 6, 7], [5, 6, 8]]))
    >>> first.tolist(), places.tolist()
    ([0, 1, 2, 5], [0, 1, 2, 0, 1, 3])
    """
    texts, length = tokens.shape
    every = torch.arange(texts * length, device=tokens.device)
    if past:
        return every, every
    alike = (tokens[:, None] == tokens).cumprod(-1)  # [text, other, pos]
    owner = alike.argmax(1)  # the first text that begins in the same way
    same = (owner * length + every[:length]).flatten()
    new = same == every
    return every[new], (new.cumsum(0) - 1)[same]


@contextmanager
def _quiet() -> Iterator[list[logging.LogRecord]]:
    """Let lm-eval print nothing and draw no bars while inside; yield the warnings that it has."""
    logger, kept = logging.getLogger("lm_eval"), BufferingHandler(capacity=sys.maxsize)
    kept.setLevel(logging.WARNING)
    handlers, propagate, init = logger.handlers, logger.propagate, tqdm.__init__

    def no_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "disable": True})

    logger.handlers, logger.propagate, tqdm.__init__ = [kept], False, no_bar
    try:
        yield kept.buffer
    finally:
        logger.handlers, logger.propagate, tqdm.__init__ = handlers, propagate, init
