"""Whether latents of one SAE exist in another: by direction, and by the tokens they fire on."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from scipy import sparse
from torch import Tensor

from groupsae.sae.base import SparseLatents

# Entries of one slice of the table of pairs: 16 MiB of cosines, 130 MiB of counts if every pair
# of latents fires together.
CHUNK = 2**22


@torch.no_grad()
def mmcs(
    baseline: Float[Tensor, "n1 d_model"], other: Float[Tensor, "n2 d_model"]
) -> Float[Tensor, " n1"]:
    """Return the largest cosine of each baseline latent to any latent of the other SAE.

    Its mean is the mean max cosine similarity (MMCS, Sharkey et al. 2022; paper, section 4.3),
    which is directional: from the baseline to the other. A latent of norm zero has cosine 0.
    """
    baseline, other = (F.normalize(w.float(), dim=1) for w in (baseline, other))
    rows = max(1, CHUNK // len(other))
    return torch.cat([(part @ other.T).amax(1) for part in baseline.split(rows)])


class Firings:
    """Which latents of an SAE fire on which tokens; firing means above zero.

    Takes 2 bytes a firing up to 65,536 latents and 4 above: 100,000 tokens at k = 128 take 26 MB.
    """

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self._latents: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    @torch.no_grad()
    def update(self, latents: SparseLatents, keep: Bool[Tensor, " batch"] | None) -> None:
        """Add tokens; those where keep is False are left out (None: all count)."""
        active = latents.acts > 0
        if keep is not None:
            active = active & keep.unsqueeze(1)
        small = np.uint16 if self.d_sae <= 2**16 else np.int32
        self._latents.append(latents.indices[active].cpu().numpy().astype(small))
        self._counts.append(active.sum(1).cpu().numpy())

    def matrix(self) -> sparse.csr_matrix:
        """Return 1 where a latent fires, [token, d_sae]."""
        counts = np.concatenate([np.zeros(1, np.int64), *self._counts])
        columns = np.concatenate([np.zeros(0, np.int32), *self._latents], dtype=np.int32)
        ones = np.ones(len(columns), np.int32)
        shape = (len(counts) - 1, self.d_sae)
        return sparse.csr_matrix((ones, columns, counts.cumsum()), shape=shape)


def max_jaccard(baseline: Firings, other: Firings) -> Float64[np.ndarray, " n1"]:
    """Return the largest Jaccard similarity of each baseline latent; nan if it never fired.

    Of latents i and j it is |tokens where both fire| / |tokens where at least one fires|. Firing
    means above zero, which the reference code does not check. The complete table of pairs is
    never in memory.

    Raises:
        ValueError: the two are not as many tokens.
    """
    first, second = baseline.matrix(), other.matrix()
    if first.shape[0] != second.shape[0]:
        raise ValueError("latents of different tokens cannot be compared")
    fired1, fired2 = (np.bincount(m.indices, minlength=m.shape[1]) for m in (first, second))
    best = np.where(fired1 > 0, 0.0, np.nan)
    by_latent = first.T.tocsr()
    rows = max(1, CHUNK // second.shape[1])
    for start in range(0, len(best), rows):
        both = by_latent[start : start + rows] @ second
        pairs = np.diff(both.indptr)
        either = np.repeat(fired1[start : start + rows], pairs) + fired2[both.indices]
        # segments of no length have no maximum: those latents keep their zero or nan
        segments = both.indptr[:-1][pairs > 0]
        jaccard = both.data / (either - both.data)
        best[start : start + rows][pairs > 0] = np.maximum.reduceat(jaccard, segments)
    return best


def mmco(baseline: Firings, other: Firings) -> float | None:
    """Return the mean of `max_jaccard` over the baseline latents that fired; None if none did.

    Mean max co-occurrence (paper, section 4.3), directional: from the baseline to the other.
    """
    best = max_jaccard(baseline, other)
    alive = ~np.isnan(best)
    return float(best[alive].mean()) if alive.any() else None
