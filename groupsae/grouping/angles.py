"""Mean angles and mean cosines between the residual streams of all pairs of layers."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from groupsae.grouping.moments import NO_TOKENS, check_finite, tokens_per_chunk
from groupsae.runtime.errors import UserError, check_choice


class AngularDistance(Metric):
    """The mean angle between layers, in fractions of pi: 0 same direction, 0.5 orthogonal.

    The same pass gives the mean cosines, `cosines`.

    d(i, j) = mean over tokens of arccos(cos(x_i, x_j)) / pi (arXiv 2410.21508, 3.1, after Gromov
    et al.). Cosines are float64: arccos loses half of the digits near 1, and in float32 equal
    layers come out 7e-5 apart. Against a loop with atan2(|u - v|, |u + v|) the measured error is
    3e-9, at twice the cost of float32. Unlike in the reference code, cosines are clamped, padding
    is left out, all tokens have equal weight, and nothing is bfloat16.

    Tokens with a zero vector in some layer have no angle there; they are left out of all pairs
    and counted in `skipped`.

    Args:
        num_layers: L.
        centring: "none" (the paper's formula) or "mean": the mean over the calibration tokens is
            subtracted from each layer first, which is near what made the published matrices. It
            comes from `LayerMoments` in a first pass and goes to `set_mean`.

    Raises:
        UserError: there is no such centring.
    """

    is_differentiable = False
    full_state_update = False
    sum: Tensor
    sum_of_cosines: Tensor
    count: Tensor
    skipped: Tensor
    mean: Tensor | None
    upper: Tensor

    def __init__(self, *, num_layers: int, centring: str = "none") -> None:
        super().__init__()
        check_choice("centring", centring, ("none", "mean"))
        self.num_layers, self.centring = num_layers, centring
        square = torch.zeros(num_layers, num_layers, dtype=torch.float64)
        self.add_state("sum", square, dist_reduce_fx="sum")
        self.add_state("sum_of_cosines", square.clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("mean", None, persistent=False)
        upper = torch.triu_indices(num_layers, num_layers, offset=1)
        self.register_buffer("upper", upper, persistent=False)

    def set_mean(self, mean: Float[Tensor, "layer d_model"]) -> None:
        """Set the mean that centring subtracts: exact, over the tokens that `update` will see."""
        assert self.centring == "mean", "set_mean is for centring=mean"
        self.mean = mean.detach().to(self.sum.device, torch.float64)

    def update(
        self,
        acts: Float[Tensor, "layer token d_model"],
        mask: Bool[Tensor, " token"] | None = None,
    ) -> None:
        """Add tokens; those with mask False are padding and are left out.

        Raises:
            UserError: an activation is not finite; nothing of this batch is counted then.
        """
        assert self.centring == "none" or self.mean is not None, "set_mean comes before update"
        acts = acts if mask is None else acts[:, mask]
        finite = torch.ones(self.num_layers, dtype=torch.bool, device=acts.device)
        total = torch.zeros_like(self.upper[0], dtype=torch.float64)
        total_cosines = torch.zeros_like(total)
        count = torch.zeros_like(self.count)
        tokens = tokens_per_chunk(acts)
        for first in range(0, acts.shape[1], tokens):
            x = acts[:, first : first + tokens].transpose(0, 1).double()  # [token, layer, d_model]
            if self.mean is not None:
                x = x - self.mean
            norms = x.square().sum(dim=-1, keepdim=True).sqrt()
            finite &= norms.isfinite().all(dim=0).squeeze(-1)
            # Multiplying by 0 or 1 rather than indexing: no synchronisation with the device.
            kept = (norms > 0).all(dim=1).squeeze(-1).double()  # [token]
            unit = x / torch.where(norms > 0, norms, 1.0)
            cosines = (unit @ unit.mT)[:, self.upper[0], self.upper[1]].clamp(-1.0, 1.0)
            total += kept @ cosines.arccos()  # [token] @ [token, pair]
            total_cosines += cosines.mul_(kept[:, None]).sum(dim=0)
            count += kept.sum()
        check_finite(finite)
        for held, added in ((self.sum, total / math.pi), (self.sum_of_cosines, total_cosines)):
            pairs = torch.zeros_like(held)
            pairs[self.upper[0], self.upper[1]] = added
            held += pairs + pairs.T
        self.count += count
        self.skipped += acts.shape[1] - count.long()

    def compute(self) -> Float[Tensor, "layer layer"]:
        """Return d, float64, symmetric with zero diagonal; `distances` keeps its shape.

        Raises:
            UserError: no token was counted.
        """
        if self.count == 0:
            raise UserError(NO_TOKENS)
        return self.sum / self.count

    def distances(self) -> Float[Tensor, "layer layer"]:
        """Return d; of a model with one layer `compute` returns a scalar."""
        return self.compute().reshape(self.num_layers, self.num_layers)

    def cosines(self) -> Float[Tensor, "layer layer"]:
        """Return the mean cosine of every pair, float64, symmetric with a diagonal of ones.

        Not the cosine of the mean angle: that is larger where the angle varies between tokens.

        Raises:
            UserError: no token was counted.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):  # as around `compute`
            total, count = self.sum_of_cosines, self.count
        if count == 0:
            raise UserError(NO_TOKENS)
        return total / count + torch.eye(self.num_layers).to(total)
