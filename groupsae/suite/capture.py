"""Activations and latents of a language model's forwards, as `Suite.capture` collects them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd  # type: ignore[import-untyped,unused-ignore]
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.lm.attached import Reading
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SparseLatents
from groupsae.suite.layer import LayerSAE


class _Part(NamedTuple):
    """Some positions."""

    acts: Float[Tensor, "batch pos d_model"]
    mask: Bool[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"] | None

    def without_last(self, count: int) -> "_Part":
        kept = None if self.tokens is None else self.tokens[:, :-count]
        return _Part(self.acts[:, :-count], self.mask[:, :-count], kept)


class Captured:
    """What one layer showed while a model read one batch of texts.

    With a KV cache a model reads the batch in several forwards; here they are one, along pos.
    """

    def __init__(self, sae: LayerSAE, tokenizer: Any) -> None:
        self._sae, self._tokenizer = sae, tokenizer
        self._parts: list[_Part] = []
        self._end = 0  # of the positions that the model has read
        self._sparse: SparseLatents | None = None

    def append(self, acts: Float[Tensor, "batch pos d_model"], reading: Reading | None) -> None:
        """Add the positions of one forward.

        They replace those that the KV cache has dropped since: an assisted generation reads
        tokens that it then rejects.
        """
        past = self._end if reading is None else reading.past
        if self._parts and past < self._end:
            self._parts = [self._joined.without_last(self._end - past)]
        tokens, mask = (None, None) if reading is None else (reading.tokens, reading.mask)
        if mask is None:
            mask = torch.ones(acts.shape[:2], dtype=torch.bool)
        self._parts.append(_Part(acts, mask.to(acts.device), tokens))
        self._end = past + acts.shape[1]
        self._sparse = None

    @property
    def _joined(self) -> "_Part":
        if len(self._parts) > 1:
            acts, masks, tokens = zip(*self._parts, strict=True)
            known = [each for each in tokens if each is not None]
            self._parts = [
                _Part(
                    torch.cat(acts, dim=1),
                    torch.cat(masks, dim=1),
                    torch.cat(known, dim=1) if len(known) == len(tokens) else None,
                )
            ]
        return self._parts[0]

    @property
    def acts(self) -> Float[Tensor, "batch pos d_model"]:
        """Return the raw activations, in the model's dtype and on its device.

        With gradients enabled they are part of the graph: after one forward,
        `torch.autograd.grad(loss, cache[5].acts)` works, as does `retain_grad`.
        """
        return self._joined.acts

    @property
    def tokens(self) -> Int[Tensor, "batch pos"] | None:
        """Return the ids of the tokens read; None if the model was given embeddings."""
        return self._joined.tokens

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """Return False where an attention mask marks padding, otherwise True."""
        return self._joined.mask

    @property
    def sparse(self) -> SparseLatents:
        """Return the active latents, `acts` and `indices`, [batch, pos, k], on the SAE's device.

        They are computed when they are first asked for, and kept. Gradients reach the activations
        if these carry them and gradients are enabled then.
        """
        if self._sparse is None:
            acts = self.acts.to(self._sae.device)
            tracked = torch.is_grad_enabled() and acts.requires_grad
            with torch.set_grad_enabled(tracked), torch.autocast(acts.device.type, enabled=False):
                self._sparse = self._sae.encode_sparse(acts)
        return self._sparse

    @property
    def latents(self) -> Float[Tensor, "batch pos d_sae"]:
        """Return the latents, dense, as `suite[layer].encode(acts)` gives them.

        A value v adds v times `suite[layer].direction(latent)` to the raw activations.
        """
        return self.sparse.dense(self._sae.d_sae)

    def active(self) -> pd.DataFrame:
        """Return all active latents at all positions but padding, a row each, strongest first.

        Columns: `latent`, `value`, `batch` and `position` (indices of `acts`, padding counted)
        and, where known, `token`: its text with a tokenizer, its id without.
        """
        values, indices, _ = self.sparse
        where = (values > 0) & self.mask.to(values.device).unsqueeze(-1)
        batch, position, _ = where.nonzero(as_tuple=True)
        columns = {
            "latent": indices[where], "value": values.detach()[where].float(),
            "batch": batch, "position": position,
        }  # fmt: skip
        found = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        found = found.sort_values("value", ascending=False, kind="stable", ignore_index=True)
        if (tokens := self.tokens) is not None:
            ids = tokens.cpu().numpy()[found["batch"], found["position"]]
            found["token"] = ids
            if self._tokenizer is not None:
                texts = {each: self._tokenizer.decode([each]) for each in set(ids.tolist())}
                found["token"] = found["token"].map(texts)
        return found

    def top(self, n: int = 10) -> pd.DataFrame:
        """Return the n latents with the largest values, each at the position where it is largest.

        Columns are those of `active`, which has all positions: for one token that is
        `cache[5].active().query("token == ' self'").head(10)`.
        """
        return self.active().drop_duplicates("latent").head(n).reset_index(drop=True)

    def __repr__(self) -> str:
        """Return the layer and the shapes."""
        batch, pos, d_model = self.acts.shape
        return (
            f"Captured(layer={self._sae.layer}, acts=[{batch}, {pos}, {d_model}], "
            f"latents=[{batch}, {pos}, {self._sae.d_sae}])"
        )


class Cache(Mapping[int, Captured]):
    """What layers showed in the forwards of a `with suite.capture(...)` block, by layer.

    `cache[5]` is layer 5 while the model read the last batch of texts. `cache.batches` has all of
    them in order, `cache.batches[0][5]` that layer in the first. Forwards that continue a KV cache
    belong to the batch they continue, so a generation is one batch: [batch, all tokens read].
    Without a KV cache each step of a generation reads all tokens again and is a batch of its own;
    the last has the same tokens.
    """

    def __init__(self, saes: Mapping[int, LayerSAE], tokenizer: Any = None) -> None:
        self.batches: list[dict[int, Captured]] = []
        self._saes, self._tokenizer = saes, tokenizer
        self._last: Reading | None = None

    def append(
        self, layer: int, acts: Float[Tensor, "batch pos d_model"], reading: Reading | None
    ) -> None:
        """Add one layer's activations in one forward.

        Blocks that run again in a backward pass (gradient checkpointing) add nothing.
        """
        if reading is None and self._last is not None:
            return
        first = reading is None or reading is not self._last  # layer of its forward
        if not self.batches or (first and not (reading is not None and reading.continues)):
            self.batches.append({})
        self._last = reading
        there = self.batches[-1]
        there.setdefault(layer, Captured(self._saes[layer], self._tokenizer)).append(acts, reading)

    def __getitem__(self, layer: int) -> Captured:
        """Return what a layer showed while the model read the last batch.

        Raises:
            UserError: the layer is not captured, or no forward has run.
        """
        if layer not in self._saes:
            raise UserError(f"layer {layer} is not captured; captured are {list(self._saes)}.")
        if not self.batches or layer not in self.batches[-1]:
            raise UserError(
                f"layer {layer} has shown nothing: run the model that was given to capture, "
                "within the block."
            )
        return self.batches[-1][layer]

    def __contains__(self, layer: object) -> bool:
        """Return whether a layer is captured."""
        return layer in self._saes

    def __iter__(self) -> Iterator[int]:
        """Return the captured layers."""
        return iter(self._saes)

    def __len__(self) -> int:
        """Return the number of captured layers."""
        return len(self._saes)

    def __repr__(self) -> str:
        """Return the layers and the number of batches."""
        return f"Cache(layers={list(self._saes)}, batches={len(self.batches)})"
