"""What replacing activations does to the language model: next-token loss and KL divergence.

All sums are kept per sequence, to be resampled, and turned into metrics at the end: one pooled
mean each, never a mean of ratios. **To add a metric** computed from these means, add it to
`effect_metrics`. A new quantity from the logits must also be summed in `CleanPredictions.compare`
and in `heldout.py`.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

# Numbers of a float32 work buffer. On a CPU it should lie in the cache: measured with
# vocabularies of 4,096 and 50,304 on two cores, 2^17 to 2^21 are alike, 2^16 takes up to 1.5 times
# as long, 2^24 two to three times. On a GPU it bounds the memory (256 MiB a buffer).
CHUNK_CPU, CHUNK_GPU = 2**18, 2**26

Means = float | np.ndarray  # of bootstrap samples, all from the same resamples


class CleanPredictions:
    """The unchanged model's predictions of a batch, to compare other logits with.

    Position t predicts the token at t + 1 of the same block; the last position of a block
    predicts nothing. A position left out by `keep` counts in no sum. The logits are kept, not
    copied: do not write into them.

    Attributes:
        ce: Float64[block] on the CPU, sum of the next-token cross-entropies in nats.
        predictions: Int64[block] on the CPU, how many were summed.
    """

    def __init__(
        self,
        logits: Float[Tensor, "block pos vocab"],
        tokens: Int[Tensor, "block pos"],
        keep: Bool[Tensor, "block pos"] | None,
    ) -> None:
        counted = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep.clone()
        counted[:, -1] = False
        self._counted = counted.to(logits.device)
        self._targets = tokens.roll(-1, dims=1).to(logits.device).flatten()[:, None]
        self._logits = logits.flatten(0, 1)
        numbers = CHUNK_CPU if logits.device.type == "cpu" else CHUNK_GPU
        self._rows = max(1, numbers // logits.shape[-1])  # of one chunk
        self.predictions: Int64[Tensor, " block"] = counted.sum(1).cpu()
        chunks = self._logits.split(self._rows)
        buffer = torch.empty_like(chunks[0], dtype=torch.float32)
        self._lse = torch.cat([_log_sum_exp(c.float(), buffer[: len(c)]) for c in chunks])
        self.ce: Float64[Tensor, " block"] = self._per_block(self._losses(self._logits, self._lse))

    @property
    def sums(self) -> dict[str, Tensor]:
        """Return the sums of each block by name."""
        return {"ce": self.ce, "predictions": self.predictions}

    def effect(self, logits: Float[Tensor, "block pos vocab"]) -> dict[str, Tensor]:
        """Return what `compare` does, by name."""
        return dict(zip(("ce", "kl"), self.compare(logits), strict=True))

    def compare(
        self, logits: Float[Tensor, "block pos vocab"]
    ) -> tuple[Float64[Tensor, " block"], Float64[Tensor, " block"]]:
        """Return the sums of cross-entropy and of KL(clean || other), in nats, on the CPU.

        KL = sum_v p_v (z_v - z'_v) + lse' - lse, with the clean logits z, their softmax p, the
        other logits z' and lse = log sum exp. Equal logits give the clean cross-entropy and a KL
        of 0 exactly; otherwise a KL may be below zero by a rounding error (about 1e-7).
        """
        other, step = logits.flatten(0, 1), self._rows
        lse, kl = torch.empty_like(self._lse), torch.empty_like(self._lse)
        # Written over and over: fresh memory for each chunk costs more than the arithmetic.
        buffers = self._lse.new_empty(2, step, logits.shape[-1], dtype=torch.float32)
        for start in range(0, len(other), step):
            rows = slice(start, start + step)
            z, changed = self._logits[rows].float(), other[rows].float()
            first, p = buffers[:, : len(z)]
            lse[rows] = _log_sum_exp(changed, first)
            torch.sub(z, self._lse[rows, None].float(), out=p).exp_()
            shift = torch.linalg.vecdot(p, torch.sub(z, changed, out=first))
            kl[rows] = shift.double() + (lse[rows] - self._lse[rows])
        return self._per_block(self._losses(other, lse)), self._per_block(kl)

    def _losses(self, logits: Tensor, lse: Tensor) -> Tensor:
        return lse - logits.gather(1, self._targets)[:, 0].double()

    def _per_block(self, values: Tensor) -> Tensor:
        return torch.where(self._counted, values.view(self._counted.shape), 0.0).sum(1).cpu()


def _log_sum_exp(
    logits: Float[Tensor, "row vocab"], buffer: Float[Tensor, "row vocab"]
) -> Float64[Tensor, " row"]:
    """Return log sum exp of each row; float32 inside, but not rounded at the size of the top."""
    top = logits.amax(1, keepdim=True)
    return top[:, 0].double() + torch.sub(logits, top, out=buffer).exp_().sum(1).double().log()


def effect_metrics(
    *, clean: Means, ce: Means, kl: Means, zero: Means, mean: Means, kl_zero: Means
) -> dict[str, Any]:
    """Return the cost of a replacement to the language model; nan where a denominator is 0.

    | metric | formula |
    |---|---|
    | `ce` | the loss with the activations replaced, nats per token |
    | `delta_ce` | ce - clean |
    | `delta_ce_percent` | 100 (ce - clean) / clean: the paper's figure (section 4.1, table 1) |
    | `ce_score` | (zero - ce) / (zero - clean): 1 is the model itself, 0 is zero ablation; the |
    | | "loss recovered" of SAELens, SAEBench and dictionary_learning |
    | `ce_score_mean` | the same against mean ablation |
    | `kl` | mean KL(clean model, model with the activations replaced), nats per token |
    | `kl_score` | (kl_zero - kl) / kl_zero (SAELens, SAEBench) |

    All arguments are means over all predictions; `clean` is of the unchanged model, `zero`, `mean`
    and `kl_zero` are of the layer ablated by zeros or by its mean.
    """
    return {
        "ce": ce,
        "delta_ce": ce - clean,
        "delta_ce_percent": 100 * _ratio(ce - clean, clean),
        "ce_score": _ratio(zero - ce, zero - clean),
        "ce_score_mean": _ratio(mean - ce, mean - clean),
        "kl": kl,
        "kl_score": _ratio(kl_zero - kl, kl_zero),
    }


def _ratio(top: Means, bottom: Means) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(bottom, 0), np.nan, np.divide(top, bottom))[()]
