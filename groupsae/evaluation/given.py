"""Evaluation with a model and a text in hand, without a run folder: `groupsae.evaluate`."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groupsae.data.filters import TokenFilter, both
from groupsae.evaluation.heldout import HeldoutSums, run_heldout
from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.results import Results
from groupsae.grouping.groupings import Grouping
from groupsae.lm.hooked import HookedLM
from groupsae.runtime.progress import token_progress
from groupsae.suite.suite import Suite


def evaluate_suite(
    suite: Suite,
    lm: HookedLM,
    blocks: Int[Tensor, "block pos"],
    means: Float[Tensor, "layer d_model"],
    filters: TokenFilter,
    bootstrap: Bootstrap,
    *,
    batch_size: int,
    together: bool,
) -> dict[str, Any]:
    """Return the figures of the command `evaluate` for a suite on blocks of tokens.

    Args:
        suite: the SAEs, on the device of the tokens.
        lm: the language model.
        blocks: tokens, on the device of the model's embeddings.
        means: mean activations, by number of the layer, of other text: for mean ablation.
        filters: which tokens count.
        bootstrap: resamples, of as many sequences as there are blocks.
        batch_size: blocks in one forward.
        together: also splice all layers together.
    """
    saes, grouping = alone(suite)
    sums = HeldoutSums(saes, [grouping], together, similarity_tokens=0, predicts=lm.predicts)
    with token_progress(
        f"evaluating {len(sums.pairs)} pairs", blocks.numel(), stderr=True
    ) as advance:
        run_heldout(sums, iter(blocks.split(batch_size)), lm, means, filters, advance)
    return {
        "tokens": sums.tokens,
        "predictions": int(sums.clean["predictions"].sum()),
        "documents": bootstrap.documents,
        "sequences": bootstrap.sequences,
        **Results(sums, bootstrap).to_json({}),
    }


def alone(suite: Suite) -> tuple[dict[str, Suite], Grouping]:
    """Return the SAEs of a suite, each alone, and the grouping that they make."""
    saes = {
        name: Suite({name: sae}, {name: suite.configs[name]}) for name, sae in suite.saes.items()
    }
    owner = {layer: suite.group_of(layer) for layer in suite.layers}
    return saes, Grouping("suite", "groups", len(saes), None, owner, suite.layers)


@torch.no_grad()
def layer_means(
    lm: HookedLM,
    blocks: Int[Tensor, "block pos"],
    layers: list[int],
    filters: TokenFilter,
    batch_size: int,
) -> Float[Tensor, "layer d_model"]:
    """Return the mean activation of each layer up to the last of `layers`; zero for others.

    Tokens count that the filters keep in all of `layers`.
    """
    total = torch.zeros(layers[-1] + 1, lm.d_model, dtype=torch.float64)
    count = 0
    with token_progress("averaging layers", blocks.numel(), stderr=True) as advance:
        for tokens in blocks.split(batch_size):
            acts = {
                layer: x.to(tokens.device).float() for layer, x in lm.acts(tokens, layers).items()
            }
            keep = filters.tokens(lm.read(tokens))
            for x in acts.values():
                keep = both(keep, filters.activations(x))
            for layer, x in acts.items():
                kept = x.flatten(0, 1) if keep is None else x[keep]
                total[layer] += kept.sum(0, dtype=torch.float64).cpu()
            count += tokens.numel() if keep is None else int(keep.sum())
            advance(tokens.numel())
    return (total / max(count, 1)).float().to(blocks.device)
