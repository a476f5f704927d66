"""A small interpretation folder with latents that fire on one word each: no model is needed."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from groupsae.files.atomic import write_json
from groupsae.interpretation.collect import FIRING
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.firings import WINDOW, windows_in
from groupsae.interpretation.reading import DIRECTIONS

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "sigma",
    "omega",
    "north",
    "south",
    "east",
    "west",
    "red",
    "green",
    "blue",
    "black",
    "white",
    "seven",
    "eight",
    "nine",
    "ten",
    "hundred",
    "river",
    "stone",
    "cloud",
    "forest",
]
CONTEXT, LATENTS, SAMPLE = 64, 8, 40


def plant(folder: Path, blocks: int = 400, layers: tuple[int, ...] = (0, 1)) -> Interpretation:
    """Write what a pass would have collected: latent i fires on word i, at every layer.

    Half of the blocks are to explain, half to score; a document ends about every 40 tokens.
    """
    draws = np.random.default_rng(0)
    tokens = draws.integers(1, len(WORDS) + 1, (blocks, CONTEXT)).astype(np.int32)
    tokens[draws.random(tokens.shape) < 1 / 40] = 0
    strings = {"0": "<end>", **{str(i): f" {word}" for i, word in enumerate(WORDS, 1)}}
    flat, half = tokens.reshape(-1), tokens.size // 2
    per_block = windows_in(CONTEXT)
    windows = (
        np.arange(flat.size) // CONTEXT * per_block + np.arange(flat.size) % CONTEXT // WINDOW
    )
    target = folder / "collected"
    (target / "g").mkdir(parents=True)
    np.save(target / "tokens.npy", tokens)
    np.save(target / "documents.npy", np.arange(blocks - blocks // 2) * 1000)  # of every block
    write_json(target / "strings.json", strings)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        rows = []
        peaks = torch.full((LATENTS, SAMPLE), -1)
        fired, in_windows = torch.zeros(2, 2, LATENTS, dtype=torch.int64)
        for latent in range(LATENTS):
            where = np.flatnonzero(flat == latent + 1)
            part = np.empty(len(where), FIRING)
            part["latent"], part["position"] = latent, where
            part["act"] = draws.uniform(0.5, 3, len(where))
            rows.append(part)
            for text, inside in enumerate((where[where < half], where[where >= half])):
                fired[text, latent] = len(inside)
                in_windows[text, latent] = len(np.unique(windows[inside]))
            held = draws.permutation(where[where >= half])[:SAMPLE]
            peaks[latent, : len(held)] = torch.from_numpy(held)
        np.save(target / "g" / f"layer.{layer}.npy", np.concatenate(rows))
        projected = np.random.default_rng(layer).normal(size=(flat.size, DIRECTIONS))
        projected.astype("<f2").tofile(target / f"random.layer.{layer}.bin")
        tensors |= {
            f"statistics/layer.{layer}/fired": fired,
            f"statistics/layer.{layer}/windows": in_windows,
            f"statistics/layer.{layer}/mass": torch.ones(2, LATENTS, dtype=torch.int64),
            f"heldout/layer.{layer}/keys": torch.zeros_like(peaks),
            f"heldout/layer.{layer}/peaks": peaks,
            f"heldout/layer.{layer}/before": torch.zeros_like(peaks, dtype=torch.uint8),
            f"heldout/layer.{layer}/lengths": torch.ones_like(peaks, dtype=torch.uint8),
            f"heldout/layer.{layer}/acts": torch.ones(LATENTS, SAMPLE, 1, WINDOW),
        }
    save_file(tensors, target / "g.safetensors")
    near = (np.arange(LATENTS)[:, None] + np.arange(1, 6)) % LATENTS
    none = np.zeros((LATENTS, 0))
    np.savez(
        target / "g.npz", nearest=near, cosines=near * 0.0, promoted=none, promoted_by=none,
        suppressed=none, suppressed_by=none, histogram=none, lowest=none, highest=none,
    )  # fmt: skip
    write_json(
        target / "collected.json",
        {
            "key": "planted", "context": CONTEXT, "end_token": 0, "num_tokens": [half, half],
            "model": "none", "hookpoint": "resid_post",
            "saes": [
                {"name": "g", "layers": list(layers), "d_sae": LATENTS,
                 "latents": list(range(LATENTS))}
            ],
        },
    )  # fmt: skip
    return Interpretation(folder)
