"""What replacing activations does to an encoder: its sentence embeddings, and what they find.

An embedding is the mean of the model's last activations over the positions of a block that count
(mean pooling, as sentence-transformers does). The counterpart of `effect.py`, for models that
predict no next token.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

Means = float | np.ndarray  # of bootstrap samples, all from the same resamples
RANKED = 1000  # blocks that are ranked against each other: the first of an evaluation


class CleanEmbeddings:
    """The unchanged model's embeddings of a batch, to compare others with.

    Attributes:
        sums: `embedding`, and 1 for each block, 0 if no position of it counts.
    """

    def __init__(
        self,
        output: Float[Tensor, "block pos d_model"],
        keep: Bool[Tensor, "block pos"] | None,
    ) -> None:
        shape, device = output.shape[:2], output.device
        kept = torch.ones(shape, dtype=torch.bool) if keep is None else keep
        self._weights = kept.to(device).float()
        self._weights /= self._weights.sum(1, keepdim=True).clamp_min(1)
        self._embedding = self._pooled(output)
        some = kept.any(1).to(device)
        self.sums = {"embedding": self._embedding, "embeddings": some}

    def effect(self, output: Float[Tensor, "block pos d_model"]) -> dict[str, Tensor]:
        """Return other embeddings, and 1 - the cosine between the two."""
        other = self._pooled(output)
        loss = 1 - F.cosine_similarity(self._embedding.double(), other.double(), dim=1)
        some = self.sums["embeddings"]
        return {"embedding": other, "embedding_loss": torch.where(some, loss, 0.0)}

    def _pooled(self, output: Tensor) -> Float[Tensor, "block d_model"]:
        return torch.einsum("bp,bpd->bd", self._weights, output.float())


def reciprocal_ranks(
    embeddings: Float64[np.ndarray, "first d_model"], documents: Int[np.ndarray, " block"]
) -> tuple[Float64[np.ndarray, " block"], Float64[np.ndarray, " block"]]:
    """Return for each block 1 / rank of the first block of the same document, and 1 if it counts.

    The other of the first `RANKED` blocks are ranked by cosine; only their embeddings are needed.
    A block without another one of its document, or beyond those, has 0 and 0.
    """
    ranks, counted = np.zeros(len(documents)), np.zeros(len(documents))
    some = embeddings[:RANKED]
    owner = documents[: len(some)]
    unit = some / np.maximum(np.linalg.norm(some, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    same = owner[:, None] == owner
    np.fill_diagonal(same, False)
    has = same.any(1)
    best = np.where(same, cosines, -np.inf).max(1, keepdims=True)
    ranks[: len(some)][has] = 1 / (1 + (cosines > best).sum(1)[has])
    counted[: len(some)] = has
    return ranks, counted


def reciprocal_ranks_of_chance(
    documents: Int[np.ndarray, " block"],
) -> Float64[np.ndarray, " block"]:
    """Return for each block what `reciprocal_ranks` is on average in a random order.

    Of n others, m are of its document. The first r - 1 miss with probability s_r =
    (n - m) / n * (n - m - 1) / (n - 1) * ..., and then the next one hits with m / (n - r + 1).

    >>> reciprocal_ranks_of_chance(np.array([0, 0, 1])).tolist()  # the other is first or second
    [0.75, 0.75, 0.0]
    """
    owner = documents[:RANKED]
    others = len(owner) - 1
    same = np.bincount(owner)[owner] - 1
    ranks = np.zeros(len(documents))
    for number in set(same[same > 0].tolist()):
        before = np.arange(others - number + 1)  # misses before the hit
        missed = np.cumprod([1.0, *(1 - number / (others - before[:-1]))])
        expected = (missed * number / (others - before) / (before + 1)).sum()
        ranks[: len(owner)][same == number] = expected
    return ranks


def embedding_metrics(
    *, loss: Means, zero: Means, mean: Means, retrieval: Means, clean_retrieval: Means
) -> dict[str, Any]:
    """Return the cost of a replacement to the embeddings.

    | metric | formula |
    |---|---|
    | `embedding_loss` | 1 - cosine of the embeddings without and with the replacement |
    | `embedding_score` | (zero - loss) / zero: 1 is the model itself, 0 is zero ablation |
    | `embedding_score_mean` | the same against mean ablation |
    | `retrieval` | mean of 1 / rank of the first other block of the same document, by cosine |
    | `retrieval_loss` | that of the unchanged model - retrieval |

    All arguments are means over blocks; `zero` and `mean` are the losses of ablations.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "embedding_loss": loss,
            "embedding_score": np.divide(zero - loss, zero),
            "embedding_score_mean": np.divide(mean - loss, mean),
            "retrieval": retrieval,
            "retrieval_loss": clean_retrieval - retrieval,
        }
