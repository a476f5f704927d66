"""The latents of one layer as other tools show them, in the units of the layer's exported SAE.

An exported SAE takes raw activations, so its latents are ours divided by the layer's norm factor.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from groupsae.interop.library import Origin
from groupsae.interop.saelens import lens_hook, lens_model
from groupsae.interpretation.bands import BANDS, bands_of
from groupsae.interpretation.files import CollectedSAE, Interpretation, LatentContexts
from groupsae.interpretation.page import Labels
from groupsae.interpretation.text import TEXTS
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE

BATCH = 128  # latents in a file, and in an upload to Neuronpedia at most
EACH_BAND = 5  # contexts
ALIGNED = 3  # coordinates of the residual stream
DIGITS = 6  # of numbers; float32 has no more
PLACES = {"resid_post": "res", "resid_pre": "res-pre", "mlp_out": "mlp", "attn_out": "att"}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What pages on Neuronpedia are called, and who owns them.

    Attributes:
        model: id of the language model; None: its name in TransformerLens.
        set: name of the source set; None: such as `groupsae-res-16k`.
        release: name of the release; None: such as `groupsae-pythia-160m`.
        creator_id: id of a user there.
        creator_name: shown as the author.

    Raises:
        UserError: a name has characters that the address of a page cannot have.
    """

    creator_id: str
    creator_name: str
    model: str | None = None
    set: str | None = None
    release: str | None = None

    def __post_init__(self) -> None:
        for key in ("model", "set", "release"):
            name = getattr(self, key)
            if name is not None and (not re.fullmatch(r"[\w.-]+", name) or "__" in name):
                raise UserError(
                    f"neuronpedia.{key} is {name!r}, which is part of a page's address: use "
                    "letters, digits, dots, dashes and single underscores."
                )


class LayerFeatures:
    """The latents of one layer of a run that has been interpreted.

    The SAE takes scaled activations; `num_layers` are those of the language model.

    Attributes:
        active: latents that fire on the layer; `silent` are the others.
        explained: what `explanations.json` has of some latents, by number.
        highest: the highest activation of each latent, 0 of a silent one.
        hook: TransformerLens' name of the place, such as `blocks.4.hook_resid_post`.
        model: id of the language model.
        set: name of the source set, which all layers share.
        suffix: what follows the set in a source's id: the group, such as `layers-3-5`.
    """

    def __init__(
        self,
        found: Interpretation,
        sae: SAE,
        origin: Origin,
        num_layers: int,
        names: Names,
        dataset: str,
        labels: Labels,
    ) -> None:
        self.found, self.sae, self.origin = found, sae, origin
        self.num_layers, self.names, self.dataset = num_layers, names, dataset
        self.collected: CollectedSAE = found.saes[origin.group]
        self.directions = self.collected.directions_at(origin.layer)
        self.decoder: Float[np.ndarray, "d_sae d_model"] = sae.directions().cpu().float().numpy()
        self.tokens = sum(found.num_tokens)
        self.fired: Int[np.ndarray, " d_sae"] = self.collected.fired(origin.layer).sum(0)
        self.active: list[int] = np.flatnonzero(self.fired > 0).tolist()
        self.silent: list[int] = np.flatnonzero(self.fired == 0).tolist()
        rows = found.explanations.get(origin.group, {}).get("latents", [])
        self.explained: dict[int, Any] = {row["latent"]: row for row in rows}
        self.labels = labels
        layer = origin.layer
        self._top = self.collected.contexts("top", layer)
        self._highest = self._top.values[:, 0].astype(np.float64)
        self._bands = bands_of([self.collected.contexts(k, layer) for k in TEXTS], EACH_BAND)
        self._histogram = self.collected.histogram(layer)
        self.highest = self._highest / origin.norm_factor
        self.hook, self.model = lens_hook(origin), names.model or lens_model(origin.model)
        width = f"{sae.d_sae // 1024}k" if sae.d_sae % 1024 == 0 else str(sae.d_sae)
        self.set = names.set or f"groupsae-{PLACES[origin.hookpoint]}-{width}"
        self.suffix = re.sub(r"[^\w-]", "-", origin.group)

    def batches(self, latents: list[int]) -> Iterator[list[int]]:
        """Yield latents for one file after the other."""
        for first in range(0, len(latents), BATCH):
            yield latents[first : first + BATCH]

    def feature(self, latent: int) -> dict[str, Any]:
        """Return all about a latent, in SAEDashboard's words.

        Histograms are pairs of bin centres and counts. What was not collected is an empty list:
        correlations with neurons and with other latents.
        """
        about, row = self.directions, self.decoder[latent]
        largest = np.argsort(-row, kind="stable")[:ALIGNED]
        counts, ends = self._trimmed(latent)
        return {
            "feature_index": latent,
            "neuron_alignment_indices": largest.tolist(),
            "neuron_alignment_values": significant(row[largest]),
            "neuron_alignment_l1": significant(abs(row[largest]) / abs(row).sum().clip(1e-12)),
            **{
                f"correlated_{others}_{values}": []
                for others in ("neurons", "features")
                for values in ("indices", "l1", "pearson")
            },
            "neg_str": self._strings(about.suppressed[latent]),
            "neg_values": significant(about.suppressed_by[latent]),
            "pos_str": self._strings(about.promoted[latent]),
            "pos_values": significant(about.promoted_by[latent]),
            "frac_nonzero": int(self.fired[latent]) / self.tokens,
            "freq_hist_data_bar_values": significant(ends - (ends[0] / 2 if len(ends) else 0)),
            "freq_hist_data_bar_heights": counts.tolist(),
            "logits_hist_data_bar_heights": about.histogram[latent].tolist(),
            "logits_hist_data_bar_values": self._logit_bins(latent),
            "n_prompts_total": self.tokens // self.found.context,
            "n_tokens_in_prompt": self.found.context,
            "dataset": self.dataset,
            "decoder_weights_dist": [],
            "activations": self._activations(latent) if self.fired[latent] else [],
            "vector": significant(row),
        }

    def _strings(self, tokens: Int[np.ndarray, " token"]) -> list[str]:
        # an empty text is refused, and could not be seen
        strings = self.found.strings
        return [strings[token] or f"<{token}>" for token in tokens.tolist()]

    def _trimmed(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return counts and upper ends of the histogram's bins up to the highest activation."""
        counts, ends = self._histogram
        used = np.flatnonzero(counts[latent])
        size = 0 if not len(used) else int(used[-1]) + 1
        width = ends[latent] / counts.shape[1] / self.origin.norm_factor
        return counts[latent, :size], width * np.arange(1, size + 1)

    def _logit_bins(self, latent: int) -> list[float]:
        about = self.directions
        bins = about.histogram.shape[1]
        low, high = float(about.lowest[latent]), float(about.highest[latent])
        return significant(low + (high - low) * (np.arange(bins) + 0.5) / max(bins, 1))

    def _activations(self, latent: int) -> list[dict[str, Any]]:
        """Return the contexts with the highest activations, then those from each band.

        A band holds the activations between its limits, of which it has the share of all tokens.
        """
        highest, (contexts, band, lowest) = self.highest[latent], self._bands
        edges = np.array([highest, *(lowest[latent, :-1] / self.origin.norm_factor), 0.0])
        counts, ends = self._trimmed(latent)
        ends[-1] = highest
        above = np.interp(edges, [0.0, *ends], [0, *counts.cumsum()]) / self.tokens
        limits = significant(edges)
        groups = [(-1.0, limits[0], -1.0)]  # the highest ones, as SAEDashboard marks them
        groups += [
            (limits[b + 1], limits[b], float(above[b] - above[b + 1])) for b in range(BANDS)
        ]
        places = [(self._top, i, groups[0]) for i in range(self._top.peaks.shape[1])]
        of_band = band[latent].tolist()
        places += [(contexts, i, groups[1 + b]) for i, b in enumerate(of_band)]
        return [
            {
                "bin_min": group[0],
                "bin_max": group[1],
                "bin_contains": group[2],
                **self._context(kind, latent, i),
            }
            for kind, i, group in places
            if kind.peaks[latent, i] >= 0
        ]

    def _context(self, contexts: LatentContexts, latent: int, i: int) -> dict[str, Any]:
        """Return tokens and activations of a context."""
        start, length = int(contexts.starts[latent, i]), int(contexts.lengths[latent, i])
        peak = int(contexts.peaks[latent, i]) - start
        acts = contexts.acts[latent, i, 0, :length].astype(np.float64)
        # these are kept in float16, which rounds up as well; peaks of the highest in float32
        acts = np.minimum(acts, self._highest[latent])
        if contexts is self._top:
            acts[peak] = contexts.values[latent, i]
        return {
            "tokens": self._strings(self.found.tokens[start : start + length]),
            "values": significant(acts / self.origin.norm_factor),
            "qualifying_token_index": peak,
        }


def significant(values: Any) -> list[float]:
    """Return numbers rounded to significant digits, which are short as JSON.

    >>> significant([0.0, 1 / 3, -1234567.8])
    [0.0, 0.333333, -1234570.0]
    """
    array = np.atleast_1d(np.asarray(values, np.float64))
    size = np.floor(np.log10(np.abs(array), out=np.zeros_like(array), where=array != 0))
    scale = 10.0 ** (DIGITS - 1 - size)
    return (np.round(array * scale) / scale).tolist()
