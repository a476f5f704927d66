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
        part: name of this process's files.
    """

    def __init__(
        self, folder: Path, latents: Int[Tensor, "latent"], d_sae: int, part: str = "0"
    ) -> None:
        self.folder, self.part = folder, part
        self.wanted = torch.zeros(d_sae, dtype=torch.bool, device=latents.device)
        self.wanted[latents] = True

    def file(self, layer: int, part: str | None = None) -> Path:
        """Return the file of a layer."""
        return self.folder / f"layer.{layer}.{part or self.part}.bin"

    def add(self, layer: int, firings: Firings, first: int) -> None:
        """Append a part of the text, which begins at position `first`."""
        latents = firings.latents
        chosen = self.wanted[latents].nonzero().squeeze(1)
        rows = np.empty(len(chosen), FIRING)
        rows["latent"] = latents[chosen].cpu().numpy()
        rows["position"] = (firings.places[chosen] + first).cpu().numpy()
        rows["act"] = firings.values[chosen].cpu().numpy()
        with self.file(layer).open("ab") as handle:
            rows.tofile(handle)

    def sizes(self, layers: Iterable[int]) -> dict[int, int]:
        """Return the bytes written so far, by layer."""
        files = {layer: self.file(layer) for layer in layers}
        return {layer: f.stat().st_size if f.exists() else 0 for layer, f in files.items()}

    def truncate(self, sizes: dict[int, int]) -> None:
        """Drop all that was written after these sizes were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for layer, size in sizes.items():
            with self.file(layer).open("ab") as handle:
                handle.truncate(size)
