"""What hooks cost in a notebook: `python -m benchmarks.notebook [device=cuda]`.

Capture, splice and steer at one layer, against the language model's forward and the SAE alone. A
random GPT-NeoX of Pythia-70M's shape, a TopK of 8,192 latents, 8 blocks of 256 tokens; and the
time of `import groupsae`, each in a process of its own. A minute on two cores; `size=smallest`
takes seconds. Writes benchmarks/results/notebook.md, with the options in its name.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import interleaved, options, random_model, smallest, timed, write
from groupsae.lm.load import FrozenLM
from groupsae.runtime.memory import keep_freed_memory
from groupsae.runtime.quiet import quiet
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite

BLOCKS, CONTEXT, ROUNDS = (1, 16, 1) if smallest() else (8, 256, 9)
SHAPE = {"num_layers": 6, "d_model": 512, "num_heads": 8, "vocab_size": 50304}
D_SAE, K, LAYER = 8192, 64, 3
if smallest():
    SHAPE, D_SAE, LAYER = (
        {"num_layers": 2, "d_model": 16, "num_heads": 2, "vocab_size": 1024},
        64,
        1,
    )
IMPORT = "import time; t = time.perf_counter(); import groupsae; print(time.perf_counter() - t)"

# what -> the things that it does, which are measured alone
PARTS = {
    "capture": ["forward"],
    "capture + sparse": ["forward", "encode_sparse"],
    "capture + latents": ["forward", "encode"],
    "splice": ["forward", "reconstruct"],
    "splice, error=True": ["forward"],
    "steer, adding": ["forward"],
    "steer, ablating": ["forward", "encode"],
}


def variants(folder: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return what to run, all without gradients."""
    lm = FrozenLM(name=folder)
    model = lm.load_with_head(device).model
    layers = list(range(SHAPE["num_layers"]))
    config = {"layers": layers, "norm_factors": dict.fromkeys(map(str, layers), 0.1)}
    sae = TopK(d_model=SHAPE["d_model"], d_sae=D_SAE, k=K)
    suite = Suite({"all": sae}, {"all": config | lm.described()}).to(device)
    tokens = torch.randint(0, 1000, (BLOCKS, CONTEXT), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens.to(device), "attention_mask": torch.ones_like(tokens).to(device)}

    def forward() -> Any:
        return model(**inputs)

    def captured(read: Callable[[Any], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with suite.capture(model, LAYER) as cache:
                forward()
            return read(cache[LAYER])

        return run

    def within(block: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with block():
                return forward()

        return run

    acts = captured(lambda layer: layer.acts)()
    return {
        "forward": forward,
        "encode": lambda: suite[LAYER].encode(acts),
        "encode_sparse": lambda: suite[LAYER].encode_sparse(acts),
        "reconstruct": lambda: suite[LAYER](acts),
        "capture": captured(lambda layer: layer.acts),
        "capture + sparse": captured(lambda layer: layer.sparse),
        "capture + latents": captured(lambda layer: layer.latents),
        "splice": within(lambda: suite.splice(model, LAYER)),
        "splice, error=True": within(lambda: suite.splice(model, LAYER, error=True)),
        "steer, adding": within(lambda: suite.steer(model, LAYER, 7, 2.0)),
        "steer, ablating": within(lambda: suite.steer(model, LAYER, ablate=[7])),
    }


def importing() -> float:
    """Return the seconds of `import groupsae` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Measure and write the table."""
    quiet()
    device = torch.device(options(arguments, device=("cpu", "cpu|cuda"))["device"])
    keep_freed_memory()
    with random_model(**SHAPE, context=CONTEXT) as folder:
        blocks = {what: timed(use, device) for what, use in variants(folder, device).items()}
        found = interleaved(blocks | {"import groupsae": importing}, ROUNDS, "hooks")
    lines = ["| | ms, median | least | times its parts alone |", "|---|---|---|---|"]
    for what, seconds in found.items():
        cells, parts = f"{1000 * seconds.median:.1f} | {1000 * seconds.least:.1f}", PARTS.get(what)
        ratio = ""
        if parts is not None:
            alone = sum(found[each].least for each in parts)
            ratio = f"{seconds.least / alone:.2f} ({' + '.join(parts)})"
        lines.append(f"| {what} | {cells} | {ratio} |")
    write(
        "notebook",
        "Hooks in a notebook",
        "\n".join(lines),
        device,
        f"{BLOCKS} blocks of {CONTEXT} tokens, one layer, no gradients; median and least of "
        f"{ROUNDS} rounds, in which the variants follow each other. The last column is a ratio of "
        "leasts, to those of what the variant has to do anyway.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
