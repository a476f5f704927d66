"""Does the fast step learn as well? `python -m benchmarks.quality [seed=0,1,2] [overrides]`.

Trains the default TopK on the bundled model three times from the same activations: by the sparse
kernels, by plain dense PyTorch with gradients by autograd, and with the latents found in
bfloat16. The differences are between SAEs of one seed; noise is what another seed changes.
Hardly a latent dies in so short a training, so AuxK has nothing to do, unless few tokens suffice,
as with `dead_after=3_000`; the dead latents' share shows how much it had. Writes
benchmarks/results/quality.md, with the options in its name, where three seeds are run.
`size=smallest` trains for a few steps, with two seeds.
"""

import functools
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.saes import SEEDS, composed, figures
from benchmarks.timing import without_size, write
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import make
from groupsae.runtime.quiet import quiet
from groupsae.sae.base import GlobalBatch, SAEOutput, SparseLatents
from groupsae.sae.topk import TopK

FAST, REFERENCE, LOW = "sparse kernels", "dense, by autograd", "found in bfloat16"


class Dense(TopK):
    """TopK with AuxK by its formulas, every latent decoded."""

    def forward(self, x: Tensor, batch: GlobalBatch) -> SAEOutput:
        """Return what `TopK.forward` does."""
        total_variance, dead = batch.total_variance, batch.dead
        pre_acts = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, indices = pre_acts.topk(self.k_at(batch.progress), dim=1)
        acts = torch.zeros_like(pre_acts).scatter(1, indices, values.relu())
        x_hat = self.decode_dense(acts)
        losses = {"fvu": (x - x_hat).square().sum() / total_variance}
        if len(dead):
            hidden = torch.ones(self.d_sae, dtype=torch.bool).index_fill(0, dead, value=False)
            best = pre_acts.masked_fill(hidden, -torch.inf).topk(min(len(dead), self.max_auxk))
            aux = torch.zeros_like(pre_acts).scatter(1, best.indices, best.values.relu())
            error = (x - x_hat).detach() - aux @ self.W_dec
            weight = self.auxk_alpha * min(len(dead) / self.max_auxk, 1.0)
            losses["auxk"] = weight * error.square().sum() / total_variance
        return SAEOutput(x_hat, SparseLatents(values.relu().detach(), indices), losses)


def main(arguments: Sequence[str]) -> None:
    """Train, print, and write the table."""
    quiet()
    register_resolver()
    given = dict(a.split("=", 1) for a in arguments if a.startswith("seed="))
    rest = [a for a in without_size(arguments) if not a.startswith("seed=")]
    seeds = given.get("seed", ",".join(SEEDS)).split(",")
    cfg = composed(["sae=topk", *rest])
    fast = make(cfg.sae)
    kinds = {
        FAST: fast,
        REFERENCE: functools.partial(Dense, **fast.keywords),
        LOW: functools.partial(fast, selection="bfloat16"),
    }
    every = [figures(seed, kinds, rest) for seed in seeds]
    fvu = {kind: np.array([each[kind][0] for each in every]) for kind in kinds}
    dead = {kind: np.mean([each[kind][-1] for each in every]) for kind in kinds}
    words = f"overrides: {' '.join(rest)}" if rest else "no overrides"
    lines = [
        f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | minus the reference "
        "| dead |",
        f"|---|{'---|' * (len(seeds) + 3)}",
    ]
    for kind, values in fvu.items():
        apart = values - fvu[REFERENCE]
        each = " | ".join(f"{value:.5f}" for value in values)
        lines.append(
            f"| {kind} | {each} | {values.mean():.5f} | {apart.mean():+.5f}, at most "
            f"{abs(apart).max():.5f} | {dead[kind]:.3%} |"
        )
    if len(seeds) < len(SEEDS):
        print("\n".join(lines))
        return
    write(
        "quality",
        "FVU of the fast step and of the plain one, at equal tokens",
        "\n".join(lines),
        torch.device("cpu"),
        f"Mean held-out FVU over layers of {cfg.model.name}, {cfg.tokens:,} tokens per SAE; "
        f"{words}. The standard deviation over seeds is {fvu[REFERENCE].std(ddof=1):.5f}. Dead: "
        "the share of latents, as a mean over SAEs, steps and seeds, that had not fired for "
        f"{cfg.dead_after:,} tokens, with which AuxK works.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
