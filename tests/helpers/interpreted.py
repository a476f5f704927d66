"""A finished run that has been interpreted, without a language model: on random activations."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupsae.interpretation.collect import Kept, SAECollector
from groupsae.interpretation.directions import BINS, Directions
from groupsae.interpretation.files import save_collected
from groupsae.interpretation.firings import entries_of, firings_of
from groupsae.interpretation.reading import DIRECTIONS, Pass
from groupsae.interpretation.text import Part, document_bounds
from groupsae.suite.suite import load_saes, load_suite
from tests.helpers.shelf import D_MODEL, run_folder

CONTEXT, BLOCKS, EXPLAIN, END = 64, 40, 25, 0
SILENT = 7  # a latent that never fires
KEPT = Kept(top=6, sample=12, across=3, latents=4)
# what texts hold: markup, bytes that are no text, NUL, nothing, an escape, other alphabets
STRINGS = [
    "<|end|>",
    "</script>",
    "\ufffd",
    "a\0b",
    "",
    r"\u0000",
    "\\\\",
    "\n    ",
    "é",
    "漢",
    "\u2028",
    '"',
]
STRINGS += [f" t{token}" for token in range(len(STRINGS), 64)]


class Interpreted(NamedTuple):
    """The run's folder, its tokens, and the raw activations of each layer on them."""

    run: Path
    tokens: Tensor
    acts: dict[int, Tensor]


def interpreted_run(folder: Path, kind: str = "topk") -> Interpreted:
    """Save a run of three layers as `run_folder` does, and what a pass over text collects."""
    run = run_folder(folder, kind)
    for file in run.glob("saes/*/sae.safetensors"):
        tensors = load_file(file)
        tensors["b_enc"][SILENT] = -1e6
        save_file(tensors, file)
    suite, draws = load_suite(str(run)), torch.Generator().manual_seed(1)
    tokens = torch.randint(0, len(STRINGS), (BLOCKS, CONTEXT), generator=draws)
    acts = {layer: torch.randn(tokens.numel(), D_MODEL, generator=draws) for layer in suite.layers}
    collectors = {}
    for name in suite.saes:
        one = load_saes(run / "saes", [name])
        records = folder / "records" / name
        collectors[name] = SAECollector(name, one, KEPT, records, torch.device("cpu"))
        collectors[name].records.truncate({})
    for text, (first, last) in enumerate(((0, EXPLAIN), (EXPLAIN, BLOCKS))):
        part = Part(text, text, first * CONTEXT, tokens[first:last])
        rows = slice(first * CONTEXT, last * CONTEXT)
        for collector in collectors.values():
            found = {
                layer: firings_of(
                    [entries_of(suite.encode_sparse(acts[layer][rows], layer), None, 0)],
                    part.tokens.numel(),
                )
                for layer in collector.layers
            }
            collector.update(part, found, document_bounds(part.tokens, END))
    for layer in suite.layers:
        projected = torch.randn(tokens.numel(), DIRECTIONS, generator=draws).half()
        projected.numpy().tofile(folder / "records" / f"random.layer.{layer}.bin")
    done = Pass.__new__(Pass)  # a finished one, which never had a language model
    done.collectors = collectors
    done.text, done.folder = (
        SimpleNamespace(
            tokens=[EXPLAIN * CONTEXT, (BLOCKS - EXPLAIN) * CONTEXT],
            read=tokens.int().numpy,
            heldout_documents=lambda: np.arange(BLOCKS - EXPLAIN),
        ),
        folder / "records",
    )
    num_tokens = [EXPLAIN * CONTEXT, (BLOCKS - EXPLAIN) * CONTEXT]
    head = {"key": "k", "context": CONTEXT, "num_tokens": num_tokens, "end_token": END}
    directions = {name: _directions(sae.directions()) for name, sae in suite.saes.items()}
    save_collected(run / "interpretation", head, done, directions, dict(enumerate(STRINGS)))
    return Interpreted(run, tokens, acts)


def _directions(decoder: Tensor) -> Directions:
    """Return the true neighbours, and effects on logits that are made up."""
    cosines = decoder @ decoder.T - 3 * torch.eye(len(decoder))
    near, n = cosines.topk(5, dim=1), len(decoder)
    tokens = np.tile(np.arange(10), (n, 1))
    rising = np.tile(np.linspace(0.1, 1, 10), (n, 1))
    histogram = np.tile(np.arange(BINS), (n, 1))
    edges = np.full(n, -2.0), np.full(n, 3.0)
    found = near.indices.numpy(), near.values.numpy()
    return Directions(*found, tokens, rising, tokens + 10, -rising, histogram, *edges)


def explain(run: Path, latents: dict[int, str], layers: list[int]) -> None:
    """Write explanations of some latents of `layers.0-1`, made at `layers` and from all.

    Of latent 3 there is one by a language model as well.
    """
    scores = {"f1": 0.5, "precision": 0.6, "recall": 0.4, "null_f1": 0.1}
    scores |= {"unigram_auprc": 0.3}
    made = [*map(str, layers), "all"]
    rows = [
        {
            "latent": latent,
            "sharing": {"pairs": []},
            "transfer": {a: dict.fromkeys(made, 0.5) for a in made},
            "all": {"text": text, "scores": scores},
            "layers": {
                str(layer): {"text": f"{layer}: {text}", "scores": scores} for layer in layers
            },
        }
        for latent, text in latents.items()
    ]
    explained = {"layers": [0, 1], "latents": rows}
    stored = {"format": 1, "key": ["k", 4], "saes": {"layers.0-1": explained}}
    (run / "interpretation" / "explanations.json").write_text(json.dumps(stored))
    judged = {
        "collected": "k",
        "judge": {"name": "some-llm"},
        "qualification": {"qualified": True},
        "saes": {"layers.0-1": {"latents": [
            {
                "latent": 3,
                "explanation": "closing tags",
                "judge": {"detection": {"own": {"f1": 0.7}, "null": {"f1": 0.2}}},
            }
        ]}},
    }  # fmt: skip
    (run / "interpretation" / "judged").mkdir()
    (run / "interpretation" / "judged" / "endpoint-1.json").write_text(json.dumps(judged))
