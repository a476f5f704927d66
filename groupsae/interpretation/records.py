"""Every firing of the latents that are explained: what rules are learnt from and scored on."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.interpretation.firings import Firings

FIRING = np.dtype([("latent", "<u4"), ("position", "<u4"), ("act", "<f2")])


class Records:
    """Appends firings of some latents to one file for each layer.

    Args:
        folder: folder of the files.
        latents: latents to record, ascending.
        d_sae: number of latents of the SAE.
        layers: layers that it serves.
    """

    def __init__(
        self, folder: Path, latents: Int[Tensor, "latent"], d_sae: int, layers: Iterable[int]
    ) -> None:
        self.files = {layer: folder / f"layer.{layer}.bin" for layer in layers}
        self.wanted = torch.zeros(d_sae, dtype=torch.bool, device=latents.device)
        self.wanted[latents] = True

    def add(self, layer: int, firings: Firings, first: int) -> None:
        """Append a part of the text, which begins at position `first`."""
        latents = firings.latents
        chosen = self.wanted[latents].nonzero().squeeze(1)
        rows = np.empty(len(chosen), FIRING)
        rows["latent"] = latents[chosen].cpu().numpy()
        rows["position"] = (firings.places[chosen] + first).cpu().numpy()
        rows["act"] = firings.values[chosen].cpu().numpy()
        with self.files[layer].open("ab") as handle:
            rows.tofile(handle)

    def sizes(self) -> dict[str, int]:
        """Return the bytes written so far, by layer."""
        return {str(layer): file.stat().st_size for layer, file in self.files.items()}

    def truncate(self, sizes: dict[str, int]) -> None:
        """Drop all that was written after these sizes were; without any, begin empty files."""
        for layer, file in self.files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as handle:
                handle.truncate(sizes.get(str(layer), 0))

    def sorted_rows(self, layer: int) -> np.ndarray:
        """Return a layer's firings by latent and position."""
        rows = np.fromfile(self.files[layer], FIRING)
        return rows[np.lexsort((rows["position"], rows["latent"]))]
