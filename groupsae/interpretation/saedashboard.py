"""SAEDashboard's files of a layer, `batch-<n>.json` and `skipped_indexes.json`, as 0.8.0 reads."""

import json
import math
from pathlib import Path

from groupsae.interpretation.features import LayerFeatures

SKIPPED = "skipped_indexes.json"


def folder_name(layer: LayerFeatures) -> str:
    """Return the name that SAEDashboard gives a layer's folder."""
    parts = (layer.model, layer.set, layer.hook, layer.sae.d_sae, layer.suffix)
    return "_".join(map(str, parts)).replace("/", "_")


def write(folder: Path, layer: LayerFeatures) -> None:
    """Write the latents that fire on a layer, and the numbers of those that do not."""
    head = {"model_id": layer.model, "layer": layer.origin.layer, "sae_set": layer.set}
    for number, latents in enumerate(layer.batches(layer.active)):
        features = [layer.feature(latent) for latent in latents]
        batch = {**head, "sae_id_suffix": layer.suffix, "features": features}
        (folder / f"batch-{number}.json").write_text(json.dumps(batch, allow_nan=False))
    skipped = {
        **head,
        "layer": str(layer.origin.layer),
        "log_sparsity": -math.log10(layer.tokens),  # a latent that fired once
        "skipped_indexes": layer.silent,
    }
    (folder / SKIPPED).write_text(json.dumps(skipped))


def recognises(folder: Path) -> bool:
    """Return whether this is a layer's folder."""
    return (folder / SKIPPED).exists()
