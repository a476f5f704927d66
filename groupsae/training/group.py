"""One group of layers and its SAE."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.data.batch import ActivationBatch
from groupsae.data.draws import stream_key
from groupsae.sae.base import SAE, AllSum, SparseLatents, firings, same
from groupsae.training.optim import Adam
from groupsae.training.step import SAETraining


class SAEFactory(Protocol):
    """Makes an SAE for a residual stream of width `d_model`."""

    def __call__(self, *, d_model: int, generator: torch.Generator, **changed: Any) -> SAE:
        """Return a fresh SAE; `changed` takes the place of configured arguments."""
        ...


class Running(NamedTuple):
    """What a member has to say of the steps since it was last logged.

    Attributes:
        values: figure -> mean over the steps, or the present state.
        steps: how many there were.
        finite: how many of them came before the first whose loss was not finite.
        skipped: steps left out since the run began: how many, how many in a row, the last.
    """

    values: dict[str, float]
    steps: int
    finite: int
    skipped: list[int]


class GroupSAE(SAETraining):
    """One group of layers, its SAE and its norm factors; can be fitted alone.

    Args:
        name: such as `layers.3-5`.
        layers: the group, sorted.
        norm_factors: 1 / sqrt(mean |x|^2) of each of the layers; activations are multiplied by
            it on the way in and divided on the way out.
        sae: factory of the SAE.
        d_model: width of the residual stream.
        optim: the optimiser's recipe.
        dead_after: tokens without firing after which a latent counts as dead.
        b_dec_start: where the decoder's bias starts, see `start_b_dec`.
        nonfinite: `stop` or `skip`, as of `GroupSAESuite`.
        seed: of the initial weights, together with the layers.
        slot: which rows of a batch are this group's.
    """

    norm_factors: Tensor
    tokens_since_fired: Tensor
    tokens_per_layer: Tensor
    running: Tensor
    skipped: Tensor

    def __init__(
        self,
        *,
        name: str,
        layers: list[int],
        norm_factors: Mapping[int, float],
        sae: SAEFactory,
        d_model: int,
        optim: Adam,
        dead_after: int,
        b_dec_start: str,
        nonfinite: str,
        seed: int,
        slot: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.layers, self.optim, self.dead_after = name, layers, optim, dead_after
        self.b_dec_start, self.nonfinite, self.slot = b_dec_start, nonfinite, slot
        generator = torch.Generator().manual_seed(stream_key(seed, layers) % 2**63)
        self.sae = sae(d_model=d_model, generator=generator)
        factors = torch.full((max(layers) + 1,), torch.nan)  # NaN: a foreign layer must not pass
        factors[layers] = torch.tensor([norm_factors[layer] for layer in layers])
        self.register_buffer("norm_factors", factors)
        self.register_buffer("tokens_since_fired", torch.zeros(self.sae.d_sae, dtype=torch.int64))
        self.register_buffer("tokens_per_layer", torch.zeros(len(factors), dtype=torch.int64))
        # steps left out: how many, how many in a row, the last
        self.register_buffer("skipped", torch.zeros(3, dtype=torch.int64))
        # sums since last logged: the loss's terms, l0, steps with a finite loss
        running = torch.zeros(len(self.sae.terms) + 2, dtype=torch.float64)
        self.register_buffer("running", running, persistent=False)
        self.running_steps = self.skipped_before = 0
        self.fired: Tensor = torch.empty(0)

    def members(self) -> list["GroupSAE"]:
        """Return itself."""
        return [self]

    def serving(self) -> dict[int, str]:
        """Return its own name for each of its layers."""
        return dict.fromkeys(self.layers, self.name)

    def rows(
        self, batch: ActivationBatch
    ) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
        """Return the rows of a batch that are this group's, scaled, and their layers."""
        acts, layers = batch.rows(self.slot)
        return self.scaled(acts, layers), layers

    def scaled(
        self, acts: Float[Tensor, "row d_model"], layers: Int[Tensor, "row"]
    ) -> Float[Tensor, "row d_model"]:
        """Return rows, each multiplied by its layer's norm factor."""
        return acts * self.norm_factors[layers].unsqueeze(1)

    def moments(
        self, x: Float[Tensor, "row d_model"], layers: Int[Tensor, "row"]
    ) -> Float[Tensor, "d_model+1+layer"]:
        """Return sum of x, sum of |x|^2 and rows per layer of scaled rows, in float64."""
        wide = torch.float64
        counts = torch.zeros(len(self.norm_factors), dtype=wide, device=x.device)
        # whole numbers, so in any order; bincount would wait for the device to know its size
        counts.scatter_add_(0, layers, torch.ones_like(layers, dtype=wide))
        squares = torch.linalg.vector_norm(x, dtype=wide).square().reshape(1)
        return torch.cat([x.sum(0, dtype=wide), squares, counts])

    def step(
        self,
        x: Float[Tensor, "row d_model"],
        layers: Int[Tensor, "row"],
        moments: Float[Tensor, "d_model+1+layer"],
        num_dead: int = 0,
        progress: float = 1.0,
        all_sum: AllSum = same,
    ) -> Float[Tensor, ""]:
        """Return this process's part of the loss; remembers what fired.

        Args:
            x: scaled activations.
            layers: the layer of each row.
            moments: of the batch over all processes, as `moments` gives them.
            num_dead: how many latents are dead.
            progress: share of the training that is done.
            all_sum: returns the sum of a tensor over all processes.
        """
        sum_x, sum_squares, counts = moments.split([self.sae.d_model, 1, len(self.norm_factors)])
        # at least 1 row and a positive variance: a batch of excluded tokens only has loss zero
        num_rows = counts.sum().clamp_min(1)
        variance = (sum_squares[0] - sum_x.square().sum() / num_rows).clamp_min(1e-12)
        output = self.sae.forward(
            x,
            variance.float(),
            self.dead_latents(num_dead),
            progress,
            (len(x) / num_rows).float(),
            all_sum,
        )
        loss = torch.stack(list(output.losses.values())).sum()
        with torch.no_grad():
            fired, active = firings(output.latents, self.sae.d_sae)
            self.fired = fired.long()
            self.tokens_per_layer += counts.long()
            self.tokens_since_fired += counts.sum().long()
            absent = torch.zeros_like(variance)
            terms = [output.losses.get(name, absent).double() for name in self.sae.terms]
            finite = loss.isfinite().double()
            self.running += torch.stack([*terms, active / num_rows, finite])
            self.running_steps += 1
        return loss

    def dead(self) -> Tensor:
        """Return the mask of latents that have not fired for `dead_after` tokens."""
        return self.tokens_since_fired >= self.dead_after

    def dead_latents(self, count: int) -> Int[Tensor, "dead"]:
        """Return the dead latents, which are `count`; so the device need not be waited for."""
        if count == 0:
            return torch.empty(0, dtype=torch.int64, device=self.tokens_since_fired.device)
        return self.dead().byte().argsort(descending=True, stable=True)[:count]

    def count_dead(self, fired: Bool[Tensor, "d_sae"]) -> None:
        """Reset the counters of what fired anywhere in the global batch."""
        self.tokens_since_fired.masked_fill_(fired, 0)

    def read_running(self, all_sum: AllSum, processes: int) -> Running:
        """Return what there is to say of the steps since the last call, and start anew.

        fvu here is that of the mixed batch: its variance includes the differences between the
        layers' means, so compare groups by `val/fvu`, which is per layer. If all steps were left
        out, there are no means.

        Args:
            all_sum: returns the sum of a tensor over all processes; each holds its part.
            processes: that train this SAE together.
        """
        values, skipped = {"dead": float(self.dead().double().mean())}, self.skipped.tolist()
        steps, finite = self.running_steps, self.finite_steps(all_sum, processes)
        if self.nonfinite == "skip":
            values["skipped"] = float(skipped[0])
        taken = steps - (skipped[0] - self.skipped_before)
        if taken > 0:
            *means, _ = (all_sum(self.running.clone()) / taken).tolist()
            values |= dict(zip((*self.sae.terms, "l0"), means, strict=True))
        self.start_running()
        return Running(values, steps, finite, skipped)

    def start_running(self) -> None:
        """Start the sums anew; steps left out before are no matter."""
        self.running.zero_()
        self.running_steps, self.skipped_before = 0, int(self.skipped[0])

    def finite_steps(self, all_sum: AllSum, processes: int) -> int:
        """Return the steps since last logged before the first whose loss was not finite.

        Such a loss spoils the weights, so that all after it are not finite either; in the step
        itself that may be so in one process only.
        """
        return int(all_sum(self.running[-1].clone())) // processes

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "batch d_model"], layer: int
    ) -> tuple[Float[Tensor, "batch d_model"], SparseLatents]:
        """Return the reconstruction of one layer's raw activations, and the latents."""
        factor = self.norm_factors[layer]
        latents = self.sae.encode(x * factor)
        return self.sae.decode(latents) / factor, latents
