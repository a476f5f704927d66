"""Capture, splice and steer: hooks in a model that the user runs, at the layers of a suite.

`Suite.capture`, `Suite.splice` and `Suite.steer` are the functions below. They hold for every
model on which SAEs can be trained, with or without its head, a KV cache, padding and gradients.
Hooks exist within the `with` block only, also if it ends in an exception. Nested blocks act in the
order of the model's layers, and on one layer in the order in which they were entered: there a
`capture` within a `splice` sees the reconstruction, one around it the raw activations.

>>> import torch
>>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
>>> model = GPTNeoXForCausalLM(GPTNeoXConfig(
...     num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2,
...     vocab_size=100,
... )).eval()
>>> config = {"layers": [0, 1], "norm_factors": {"0": 0.5, "1": 0.25}}
>>> sae = groupsae.TopK(d_model=8, d_sae=32, k=4)
>>> suite = groupsae.Suite({"all": sae}, {"all": config})
>>> tokens = torch.tensor([[1, 2, 3]])

>>> with suite.capture(model, layers=[0, 1]) as cache:
...     clean = model(tokens).logits
>>> cache[1]
Captured(layer=1, acts=[1, 3, 8], latents=[1, 3, 32])
>>> list(cache[1].top(2).columns)
['latent', 'value', 'batch', 'position', 'token']

A latent's value is as the SAE has it; a scale of 1 adds W_dec[latent] / norm_factor:

>>> with suite.steer(model, layer=1, latent=7, scale=1.0), suite.capture(model, 1) as steered:
...     changed = model(tokens).logits
>>> added = steered[1].acts - cache[1].acts
>>> torch.allclose(added, suite[1].W_dec[7] / 0.25, atol=1e-5)
True

>>> with suite.splice(model, layers=[1]), suite.capture(model, 1) as within:
...     changed = model(tokens).logits
>>> torch.equal(within[1].acts, suite[1](cache[1].acts))
True
>>> with suite.splice(model, error=True):
...     torch.equal(model(tokens).logits, clean)
True

Positions count what the model has read since its KV cache was empty, padding included, from 0. To
change only what is generated after prompts of n tokens: `positions=slice(n, None)`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from operator import index
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from groupsae.lm.attached import AttachedLM, Reading
from groupsae.runtime.errors import UserError
from groupsae.suite.capture import Cache
from groupsae.suite.layer import LayerSAE

Number = int | float
Positions = slice | None
# layers or latents, and what to multiply them with: also arrays and tensors
Indices = SupportsIndex | Iterable[SupportsIndex]
Scales = SupportsFloat | Iterable[SupportsFloat]


def listed(values: Any) -> list[Any]:
    """Return the items of a list, an array, a tensor or a column of a table, or of one number."""
    found = values.tolist() if hasattr(values, "tolist") else values
    many = isinstance(found, Iterable) and not isinstance(found, str | Mapping)
    return list(found) if many else [found]


def indices(values: Any, what: str) -> list[int]:
    """Return the numbers of layers or latents, of whatever `listed` takes.

    Raises:
        UserError: one is no integer.
    """
    found = listed(values)
    for each in found:
        if isinstance(each, bool) or not isinstance(each, SupportsIndex):
            raise UserError(f"{what} is {each!r}: give its number, an integer, or a list of them.")
    return [index(each) for each in found]


def capture(
    model: nn.Module, saes: Mapping[int, LayerSAE], tokenizer: Any = None
) -> AbstractContextManager[Cache]:
    """Collect the layers' activations in all forwards; their latents are computed when asked for.

    The activations are those of plain hooks, bit for bit. The forwards are unchanged.
    """
    cache = Cache(saes, tokenizer)

    def visit(layer: int, acts: Tensor, reading: Reading | None) -> Tensor:
        cache.append(layer, acts, reading)
        return acts.clone()  # the model may write into what it continues with

    return _attached(model, saes).hooked(saes, visit, cache)


def splice(
    model: nn.Module,
    saes: Mapping[int, LayerSAE],
    error: bool = False,
    positions: Positions = None,
) -> AbstractContextManager[None]:
    """Replace the activations of layers by their reconstructions, or by the same plus the error.

    With `error` the forwards are unchanged, bit for bit. Then gradients flow through the
    reconstruction only, as the error is a constant (Marks et al., arXiv 2403.19647).
    """
    _check_positions(positions)

    def visit(layer: int, acts: Tensor, reading: Reading | None) -> Tensor | None:
        if error and not (torch.is_grad_enabled() and acts.requires_grad):
            return None
        sae = saes[layer]
        x_hat = sae(acts.to(sae.device)).to(acts)
        if error:  # adds exactly zero
            x_hat = acts.detach() + (x_hat - x_hat.detach())
        return _only_at(positions, reading, acts, x_hat)

    return _attached(model, saes).hooked(saes, visit, None)


def steer(
    model: nn.Module, edits: "Edits", positions: Positions = None
) -> AbstractContextManager[None]:
    """Change latents of one layer."""
    _check_positions(positions)
    saes = {edits.sae.layer: edits.sae}

    def visit(_layer: int, acts: Tensor, reading: Reading | None) -> Tensor | None:
        return _only_at(positions, reading, acts, edits(acts))

    return _attached(model, saes).hooked(saes, visit, None)


class Edits:
    """Changes of some latents of a layer, as what they add to its raw activations.

    Latents that are added to need no encoding. All others become clamp(factor z + shift, low,
    high); the difference to z times their directions is added, which keeps the SAE's error.
    """

    def __init__(
        self,
        sae: LayerSAE,
        latent: Indices | None = None,
        scale: Scales = 1.0,
        *,
        set: Mapping[int, Number] | None = None,
        multiply: Mapping[int, Number] | None = None,
        clamp: Mapping[int, tuple[Number | None, Number | None]] | None = None,
        ablate: Indices = (),
    ) -> None:
        added = [] if latent is None else indices(latent, "latent")
        scales = [float(each) for each in listed(scale)]
        if len(scales) == 1:
            scales *= len(added)
        if len(scales) != len(added):
            raise UserError(
                f"steer has {len(added)} latents and {len(scales)} scales: give one scale for "
                "all, or one each."
            )
        inf = math.inf
        changes = [
            *((j, (0.0, 0.0, -inf, inf)) for j in listed(ablate)),
            *((j, (0.0, float(value), -inf, inf)) for j, value in _items("set", set)),
            *((j, (float(factor), 0.0, -inf, inf)) for j, factor in _items("multiply", multiply)),
            *((j, (1.0, 0.0, *_bounds(j, bounds))) for j, bounds in _items("clamp", clamp)),
        ]
        changed = indices([j for j, _ in changes], "latent")
        twice = [j for j, count in Counter(added + changed).items() if count > 1]
        if twice:
            raise UserError(f"steer changes latent {twice[0]} twice: give it one change.")
        if not added and not changes:
            raise UserError(
                "steer changes nothing: give latent= and scale=, or set=, multiply=, clamp= or "
                "ablate=."
            )
        self.sae = sae
        self._added = None
        if added:
            weights = torch.tensor(scales, dtype=sae.dtype, device=sae.device)
            self._added = (weights.unsqueeze(1) * sae.direction(added)).sum(0)
        self._latents = torch.tensor(changed, dtype=torch.int64, device=sae.device)
        self._changes = torch.tensor([c for _, c in changes], dtype=sae.dtype, device=sae.device)
        self._directions = sae.direction(self._latents)

    def __call__(
        self, acts: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the changed activations, rounded once to their dtype."""
        change = self._added
        if len(self._latents):
            z = self.sae.encode(acts.to(self.sae.device))[..., self._latents]
            factor, shift, low, high = self._changes.T
            edited = (factor * z + shift).clamp(low, high)
            by_edits = (edited - z) @ self._directions
            change = by_edits if change is None else change + by_edits
        assert change is not None
        return (acts + change.to(acts.device)).to(acts.dtype)


def _items(name: str, given: Any) -> Iterable[tuple[Any, Any]]:
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{name} is {given!r}: give a dict, latent -> value, such as {{17: 4.0}}.")
    return (given or {}).items()


def _bounds(latent: int, bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise UserError(
            f"clamp of latent {latent} is {bounds!r}: give (low, high), such as (0.0, 4.0); None "
            "is no bound."
        )
    low, high = bounds
    low = -math.inf if low is None else float(low)
    high = math.inf if high is None else float(high)
    if low > high:
        raise UserError(f"clamp of latent {latent} is {low:g} to {high:g}: give the lower first.")
    return low, high


def _check_positions(positions: Positions) -> None:
    if positions is None:
        return
    if (
        not isinstance(positions, slice)
        or min(positions.start or 0, positions.stop or 0) < 0
        or (positions.step or 1) < 1
    ):
        raise UserError(
            f"positions is {positions!r}: give a slice that counts from the first position that "
            "the model reads, such as slice(8, None); the end is not known while it generates."
        )


def _only_at(
    positions: Positions, reading: Reading | None, acts: Tensor, changed: Tensor
) -> Tensor | None:
    """Return the changed activations at some positions, and those of before elsewhere."""
    if positions is None:
        return changed
    past = 0 if reading is None else reading.past
    here = [at - past for at in range(past + acts.shape[1])[positions] if at >= past]
    if not here:
        return None
    result = acts.clone()
    result[:, here] = changed[:, here]
    return result


def _attached(model: nn.Module, saes: Mapping[int, LayerSAE]) -> AttachedLM:
    """Return the model with the hookpoint of the suite.

    Raises:
        UserError: they do not fit, or are on different devices. (Where accelerate spreads a model
            over devices, activations travel to the SAE and back.)
    """
    sae = next(iter(saes.values()))
    attached = AttachedLM(model, sae.cfg, sae.d_model, max(saes))
    on = {parameter.device for parameter in model.parameters()}
    if len(on) == 1 and not hasattr(model, "hf_device_map") and sae.device not in on:
        (device,) = on
        raise UserError(
            f"the suite is on {sae.device} and the model on {device}: suite.to('{device}') moves "
            "the suite."
        )
    return attached
