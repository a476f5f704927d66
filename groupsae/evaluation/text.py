"""The part `heldout` of an evaluation: reconstruction and loss on held-out text."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from groupsae.cost.counter import flop_counter
from groupsae.cost.model import activation_flops
from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.activations import ActivationDataModule
from groupsae.evaluation.cost import planned_flops, relative_costs
from groupsae.evaluation.files import begin_evaluation, save_evaluation
from groupsae.evaluation.heldout import HeldoutSums, run_heldout
from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.parts import Run
from groupsae.evaluation.results import Results
from groupsae.files.reading import require_json
from groupsae.runtime.errors import UserError
from groupsae.runtime.progress import token_progress


@dataclass(kw_only=True)
class Heldout:
    """Every SAE on every layer it serves, and spliced into the model there.

    The defaults are those of `conf/evaluation/heldout.yaml`.

    Args:
        tokens: held-out tokens; None: as many as the run's configuration has, or all.
        exclude_special_tokens: leave out positions of BOS and EOS; None: as in training.
        together: also splice all layers of a grouping together.
        similarity_tokens: tokens to compare firings on.
        bootstrap: the arguments of `Bootstrap`.
    """

    name: ClassVar[str] = "heldout"
    tokens: int | None
    exclude_special_tokens: bool | None
    together: bool
    similarity_tokens: int
    bootstrap: Mapping[str, Any]

    def check(self, data: ActivationDataModule) -> None:
        """Raise UserError if there is less held-out text than asked for."""
        self._steps(data)

    def run(self, run: Run) -> dict[str, Any]:
        """Write `evaluation.json` and the other files of the part; return the content of it.

        Raises:
            UserError: the ledger is of another version, or nothing can be written.
        """
        data, watch = run.data, Stopwatch()
        steps = self._steps(data)
        if self.exclude_special_tokens is not None:
            data.exclude_special_tokens = self.exclude_special_tokens
        # the training cost of imported SAEs is unknown
        imported = "adopted" in require_json(run.folder / "summary.json")
        ledger = None if imported else require_json(run.folder / "ledger.json")
        costs = {} if ledger is None else relative_costs(ledger, run.groupings, run.saes)
        bootstrap = Bootstrap(data.heldout_documents(steps), **self.bootstrap)
        if not run.lm.predicts:
            run.say(
                f"{data.lm.name} predicts no next token (stack: {data.lm.stack}): in place of "
                "cross-entropy, the effect on its sentence embeddings is measured."
            )
        sums = HeldoutSums(
            run.saes, run.groupings, self.together, self.similarity_tokens, run.lm.predicts
        )
        geometry, context = data.lm.geometry, data.packing.context
        tokens = steps * data.tokens_per_step
        begin_evaluation(run.folder / "evaluation")
        with watch:
            means, averaged, flops = _layer_means(data, tokens)
            flops += _run(data, sums, steps, means)
            results = Results(sums, bootstrap)
            figures = results.to_json(costs)
        together = run.groupings if self.together else []
        planned = averaged * activation_flops(geometry.num_layers, geometry.d_model, context)
        planned += tokens * planned_flops(geometry, context, run.saes, together, run.lm)
        head = {
            **run.described(),
            "sequences": bootstrap.sequences,
            "documents": bootstrap.documents,
            "tokens": sums.tokens,
            "predictions": int(sums.clean["predictions"].sum()),
            "bootstrap": self.bootstrap,
            "cost": {"planned_flops": planned, "measured_flops": flops, "seconds": watch.seconds},
        }
        return save_evaluation(run.folder / "evaluation", head, figures, results)

    def _steps(self, data: ActivationDataModule) -> int:
        """Return the steps to evaluate on; by default fewer if the text is shorter.

        The text is packed first if necessary.
        """
        tokens = self.tokens
        available = data.steps_for("heldout", None) * data.tokens_per_step
        if tokens is not None and tokens > available:
            raise UserError(
                f"evaluation.tokens={tokens:,} is more than the {available:,} tokens that the "
                f"held-out split has: ask for at most {available:,}, or train with a larger "
                "stream.heldout_fraction or more text."
            )
        if tokens is not None and tokens < data.tokens_per_step:
            raise UserError(
                f"evaluation.tokens={tokens:,} is less than one step of {data.tokens_per_step:,} "
                f"tokens: ask for at least {data.tokens_per_step:,}."
            )
        return data.steps_for("heldout", data.heldout_tokens if tokens is None else tokens)


def _run(data: ActivationDataModule, sums: HeldoutSums, steps: int, means: Tensor) -> int:
    """Add the held-out text to the sums; return the FLOPs."""
    parts = (
        part
        for batch in data.loader("heldout", steps)
        for part in batch.to(means.device).split(data.blocks_per_forward)
    )
    title, total = f"evaluating {len(sums.pairs)} pairs", steps * data.tokens_per_step
    with token_progress(title, total, show=True) as advance:
        return run_heldout(sums, parts, data.hooked, means, data.filters, advance)


def _layer_means(data: ActivationDataModule, tokens: int) -> tuple[Tensor, int, int]:
    """Return the mean activation of every layer, [layer, d_model]; its tokens; its FLOPs.

    From calibration text: the means must not come from the text of the evaluation.
    """
    total, count, seen = torch.zeros(()), 0, 0
    batches = data.calibration_batches(tokens)
    with flop_counter() as counter:
        first = next(batches)
    with token_progress("averaging layers", tokens, show=True) as advance:
        for batch in chain([first], batches):
            seen += batch.acts.shape[1]
            keep = batch.everywhere()
            acts = batch.acts if keep is None else batch.acts[:, keep]
            total = total.to(acts.device) + acts.sum(1, dtype=torch.float64)
            count += acts.shape[1]
            advance(batch.acts.shape[1])
    per_token = counter.get_total_flops() / first.acts.shape[1]
    return (total / count).float(), seen, round(seen * per_token)
