"""The part `probes` of an evaluation: how well a few latents tell what a token is.

A k-sparse probe (Gurnee et al., arXiv 2305.01610) is a logistic regression on the k latents whose
means over the two classes differ most. Its AUC on other documents shows whether an SAE has latents
of its own for a concept. The baselines are k channels of the activations, and all of them: the
complete residual stream. Both often beat the latents.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from groupsae.data.activations import ActivationDataModule
from groupsae.data.filters import TokenFilter, both
from groupsae.data.packing import begin_of_text
from groupsae.evaluation.examples import (
    Examples,
    Reader,
    Task,
    files_of,
    python_examples,
    python_files,
    table_examples,
)
from groupsae.evaluation.intervals import Bootstrap, Estimate, interval_of, table_of_groupings
from groupsae.evaluation.parts import Subject
from groupsae.grouping.groupings import Grouping
from groupsae.lm.hooked import HookedLM
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress
from groupsae.suite.suite import Suite

CS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse strengths of regularisation to choose from
FOLDS = 3  # of the cross-validation that chooses
FORWARD = 8192  # tokens of one forward, about
PIECE = 4096  # rows encoded at once
MEMORY = 2**30  # bytes of activations kept at once: of the layers that fit, at least one
CHANNELS, RESIDUAL = "channels", "residual"  # the baselines

Features: TypeAlias = "np.ndarray | sparse.csr_matrix"  # [example, feature]


@dataclass(kw_only=True)
class Probes:
    """How well a few latents of each SAE tell concepts.

    The defaults are those of `conf/evaluation/probes.yaml`.

    Args:
        labels: `python` (`CONCEPTS`, on files of the standard library that no SAE was trained on),
            or files with texts and labels, as `files_of` has it.
        k: numbers of latents.
        examples: most examples with a concept, and without it, in either half.
        seed: of the draw of examples.
        bootstrap: the arguments of `Bootstrap`, which resamples the documents of the test.
    """

    name: ClassVar[str] = "probes"
    labels: Sequence[str]
    k: Sequence[int]
    examples: int
    seed: int
    bootstrap: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.k = sorted(set(self.k))

    def check(self, data: ActivationDataModule) -> None:
        """Raise UserError if a file of labels does not exist."""
        files_of(self.labels)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return the AUC of every probe, and the means over tasks, then over layers.

        Raises:
            UserError: labels or texts cannot be used, or training left out too many examples.
        """
        trained = next(iter(subject.saes.values())).cfg
        tokenizer = subject.tokenizer()
        special, start = tokenizer.all_special_ids, subject.lm.start_token
        filters = TokenFilter.recorded(trained, special, start)
        sets = list(self._sets(trained, tokenizer))
        layers = sorted({layer for suite in subject.saes.values() for layer in suite.layers})
        served = {x: [n for n, suite in subject.saes.items() if x in suite.layers] for x in layers}
        pairs = sum(map(len, served.values()))
        found: list[Scored] = []
        tokens = [sum(map(len, examples.windows)) for examples in sets]
        title, total = f"probing {pairs} pairs", sum(tokens) * (pairs + len(layers))
        with token_progress(title, total) as advance:
            for examples, count in zip(sets, tokens, strict=True):
                probing = Probing(examples, self.k, self.bootstrap)
                for layer, acts, kept in activations(subject.lm, examples, layers, filters):
                    found += probing.scored(CHANNELS, layer, acts.numpy(), kept)
                    advance(count)
                    for name in served[layer]:
                        z = latents(subject.saes[name], layer, acts)
                        found += probing.scored(name, layer, z, kept)
                        advance(count)
        return self._results(subject, sets, found)

    def _sets(self, trained: Mapping[str, Any], tokenizer: Any) -> Iterator[Examples]:
        stream = {**trained, **trained.get("stream", {})}
        opening = [begin_of_text(tokenizer)] if stream.get("prepend_bos") else []
        context = stream.get("context") or 1024
        reader = Reader(tokenizer, context, opening, self.examples, self.seed)
        if "python" in self.labels:  # fitted and tested on what no SAE was trained on
            files = python_files(stream)
            yield python_examples([files["calibration"], files["heldout"]], reader)
        for file in files_of(self.labels):
            yield table_examples(file, reader)

    def _results(
        self, subject: Subject, sets: list[Examples], found: "list[Scored]"
    ) -> dict[str, Any]:
        tasks: dict[tuple[str, int, int | None], list[Estimate]] = {}
        for each in found:
            tasks.setdefault((each.features, each.layer, each.k), []).append(each.auc)
        means = {key: np.mean(estimates, axis=0) for key, estimates in tasks.items()}
        show = partial(interval_of, level=self.bootstrap["level"])

        def over(grouping: Grouping, features: str | None, k: int | None) -> Estimate:
            """Return the mean over layers, for a baseline's features or each layer's SAE."""
            owner = grouping.sae_of_layer
            return np.mean([means[features or owner[x], x, k] for x in grouping.grouped], axis=0)

        groupings = {
            each.name: {
                **{f"auc_{k}": over(each, None, k) for k in self.k},
                **{f"auc_{k}_channels": over(each, CHANNELS, k) for k in self.k},
                "auc_residual": over(each, RESIDUAL, None),
            }
            for each in subject.groupings
        }
        compared = {f"auc_{k}": False for k in self.k}
        by_layer: dict[tuple[str, int], dict[str, Any]] = {}
        for (name, layer, number), mean in means.items():
            row = by_layer.setdefault((name, layer), {"sae": name, "layer": layer})
            row["auc_residual" if number is None else f"auc_{number}"] = show(mean)
        return {
            "labels": self.labels,
            "k": self.k,
            "bootstrap": self.bootstrap,
            "groupings": table_of_groupings(subject.groupings, groupings, show, compared),
            "layers": list(by_layer.values()),
            "tasks": [row for examples in sets for row in examples.described()],
            "probes": [each._asdict() | {"auc": show(each.auc)} for each in found],
        }


class Scored(NamedTuple):
    """The probe of one task on k features of a layer: an SAE's, or a baseline's."""

    task: str
    features: str
    layer: int
    k: int | None  # None: all
    chosen: str  # which
    auc: Estimate


class Probing:
    """Fits and tests probes on some examples.

    Args:
        examples: with their tasks.
        ks: numbers of features, in order.
        bootstrap: arguments of `Bootstrap`.
    """

    def __init__(
        self, examples: Examples, ks: Sequence[int], bootstrap: Mapping[str, Any]
    ) -> None:
        self.examples, self.ks = examples, ks
        documents = np.unique(examples.document[examples.test])
        self._owner = np.searchsorted(documents, examples.document)  # of those in the test
        drawn = Bootstrap(documents, **bootstrap).weights
        self._weights = np.concatenate([np.ones((1, len(documents))), drawn])

    def scored(
        self, name: str, layer: int, x: Features, kept: Bool[np.ndarray, " example"]
    ) -> Iterator[Scored]:
        """Yield the probes of every task on features that have a name, and on the residual.

        An example is left out if training leaves out its activation at this layer.

        Raises:
            UserError: then one half of a task has no example with its concept, or none without.
        """
        tasks = [task.only(kept) for task in self.examples.tasks]
        for task in tasks:
            sides = zip(self.examples.test[task.rows], task.positive, strict=True)
            if len(set(sides)) < 4:
                raise UserError(
                    f"the probe of {task.name} has too few examples at layer {layer}: training "
                    "left out the others (stream.exclude_special_tokens, stream.skip_positions, "
                    "stream.max_norm_ratio). Give other evaluation.probes.labels."
                )
        differences = class_differences(x, [task.only(~self.examples.test) for task in tasks])
        for task, difference in zip(tasks, differences.T, strict=True):
            order = np.argsort(-abs(difference), kind="stable")[: self.ks[-1]]
            columns = x[task.rows][:, order]
            dense = columns if isinstance(columns, np.ndarray) else columns.toarray()
            for k in self.ks:
                auc = self._auc(task, dense[:, :k] * np.sign(difference[order[:k]]))
                yield Scored(task.name, name, layer, k, " ".join(map(str, order[:k])), auc)
            if name == CHANNELS:
                yield Scored(task.name, RESIDUAL, layer, None, "", self._auc(task, x[task.rows]))

    def _auc(self, task: Task, x: Float[np.ndarray, "n k"]) -> Estimate:
        test, positive = self.examples.test[task.rows], task.positive
        scores = x[test, 0]  # of one feature: a probe would not change the order
        if x.shape[1] > 1:
            document = self.examples.document[task.rows]
            scores = fit_probe(x[~test], positive[~test], document[~test])(x[test])
        return auc(scores, positive[test], self._owner[task.rows][test], self._weights)


def class_differences(x: Features, tasks: Sequence[Task]) -> Float[np.ndarray, "feature task"]:
    """Return the mean over the positive minus that over the negative examples of each task."""
    weights = np.zeros((x.shape[0], len(tasks)))
    for column, task in enumerate(tasks):
        share = np.where(task.positive, 1 / task.positive.sum(), -1 / (~task.positive).sum())
        weights[task.rows, column] = share
    return np.asarray(x.T @ weights)


def fit_probe(
    x: Float[np.ndarray, "n k"], positive: Bool[np.ndarray, " n"], document: Int[np.ndarray, " n"]
) -> Callable[[Float[np.ndarray, "m k"]], Float[np.ndarray, " m"]]:
    """Return what scores rows: a logistic regression on standardised features.

    Its C is the one of `CS` with the largest mean AUC in a cross-validation by documents.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 0, std, 1.0)
    x = (x - mean) / std
    folds = min(FOLDS, len(np.unique(document)))
    parts = list(GroupKFold(folds).split(x, groups=document)) if folds > 1 else []
    parts = [p for p in parts if all(0 < positive[rows].mean() < 1 for rows in p)]

    def fitted(rows: np.ndarray, c: float) -> Any:
        return LogisticRegression(C=c, max_iter=1000).fit(x[rows], positive[rows])

    def score(c: float) -> float:
        others = [
            (fitted(rows, c).decision_function(x[out]), positive[out]) for rows, out in parts
        ]
        return float(np.mean([auc(*each)[0] for each in others]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any direction that works will do
        best = fitted(np.arange(len(x)), max(CS, key=score) if parts else 1.0)
    return lambda rows: best.decision_function((rows - mean) / std)


def auc(
    scores: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    owner: Int[np.ndarray, " n"] | None = None,
    weights: Float[np.ndarray, "resample document"] | None = None,
) -> Float[np.ndarray, " resample"]:
    """Return the chance that a positive example has a larger score than a negative one.

    Ties count half. Each example counts as often as its owner, a document, does in a resample:
    with R[d, e] the pairs of a positive example of d and a negative one of e in the right order,
    AUC = w R w / (w p)(w n), nan where a resample has no pair.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])).tolist()
    [0.875]
    """
    owner = np.zeros(len(scores), dtype=int) if owner is None else owner
    weights = np.ones((1, 1)) if weights is None else weights
    values, at = np.unique(scores, return_inverse=True)
    documents = weights.shape[1]
    lower = np.zeros((len(values), documents))
    np.add.at(lower, (at[~positive], owner[~positive]), 1)
    lower = lower.cumsum(0) - lower / 2
    right = np.zeros((documents, documents))
    np.add.at(right, owner[positive], lower[at[positive]])
    counts = [np.bincount(owner[side], minlength=documents) for side in (positive, ~positive)]
    with np.errstate(invalid="ignore"):
        pairs = (weights @ counts[0]) * (weights @ counts[1])
        return np.asarray(((weights @ right) * weights).sum(1) / pairs)


# ---- features -----------------------------------------------------------------------------------


@torch.no_grad()
def activations(
    lm: HookedLM, examples: Examples, layers: Sequence[int], filters: TokenFilter
) -> Iterator[tuple[int, Float[Tensor, "example d_model"], Bool[np.ndarray, " example"]]]:
    """Yield each layer, its raw activations on the CPU, and which of them training would keep.

    The text is read once for as many layers as `MEMORY` holds. Windows of one length are read
    together, so that nothing is padded.
    """
    count, device = len(examples.window), next(lm.model.parameters()).device
    lengths = np.array([len(window) for window in examples.windows])[examples.window]
    order = np.lexsort((examples.window, lengths))
    batches = []
    for length, same in groupby(order, key=lambda row: lengths[row]):
        windows: dict[int, list[int]] = {}  # the examples of each
        for row in same:
            windows.setdefault(int(examples.window[row]), []).append(int(row))
        every, size = list(windows.items()), max(1, FORWARD // int(length))
        batches += [dict(every[start : start + size]) for start in range(0, len(every), size)]
    step = max(1, MEMORY // (4 * count * lm.d_model))
    for chosen in (layers[first : first + step] for first in range(0, len(layers), step)):
        found = {layer: torch.empty(count, lm.d_model) for layer in chosen}
        keep = {layer: np.ones(count, dtype=bool) for layer in chosen}
        for batch in batches:
            tokens = torch.tensor([examples.windows[window] for window in batch], device=device)
            rows = np.concatenate(list(batch.values()))
            block = np.repeat(np.arange(len(batch)), [len(each) for each in batch.values()])
            at = (torch.from_numpy(block), torch.from_numpy(examples.position[rows]))
            if lm.start_token is not None:  # a token is read one position later
                tokens, at = torch.cat([tokens, tokens[:, -1:]], dim=1), (at[0], at[1] + 1)
            counted = filters.tokens(lm.read(tokens))
            for layer, acts in lm.acts(tokens, chosen).items():
                acts = acts.float()
                found[layer][rows] = acts[at].cpu()
                kept = both(counted, filters.activations(acts))
                if kept is not None:
                    keep[layer][rows] = kept.cpu()[at].numpy()
        for layer in chosen:
            yield layer, found.pop(layer), keep.pop(layer)


def latents(suite: Suite, layer: int, acts: Float[Tensor, "example d_model"]) -> sparse.csr_matrix:
    """Return the latents of raw activations of a layer, [example, d_sae]."""
    parts = []
    for piece in acts.split(PIECE):
        values, indices, _ = suite.encode_sparse(piece.to(suite.device), layer)
        ends = np.arange(len(piece) + 1) * values.shape[1]
        flat = (values.flatten().cpu().numpy(), indices.flatten().cpu().numpy(), ends)
        parts.append(sparse.csr_matrix(flat, shape=(len(piece), suite[layer].d_sae)))
    return sparse.vstack(parts, format="csr")
