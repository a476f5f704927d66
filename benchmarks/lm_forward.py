"""What a forward of the language model costs: `python -m benchmarks.lm_forward [device=cuda]`.

Each variant differs from the way groupsae runs the model in one thing (the head brings the final
norm along). Models: the bundled one and a random GPT-NeoX of Pythia-70M's shape, 8 blocks of 256
tokens. Two minutes on two cores; `size=smallest` takes seconds, without compiling. Writes
benchmarks/results/lm_forward.md, with the options in its name.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved, options, random_model, smallest, timed, write
from groupsae.lm.hooked import HookedLM, nothing_padded
from groupsae.lm.load import FrozenLM
from groupsae.runtime.memory import keep_freed_memory
from groupsae.runtime.quiet import quiet

BLOCKS, CONTEXT, ROUNDS = (1, 16, 1) if smallest() else (8, 256, 5)
BASE = "as groupsae runs it"


def variants(name: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return what to run, by the difference."""
    tokens = torch.randint(0, 1000, (BLOCKS, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)

    def load(**changes: Any) -> HookedLM:
        return FrozenLM(name=name, **changes).load(device)

    def run(lm: HookedLM, layers: range | None = None, **changes: Any) -> dict[int, Tensor]:
        every = range(len(lm.blocks)) if layers is None else layers
        seen: dict[int, Tensor] = {}
        lm.run(lm.inputs(tokens) | changes, every, lambda i, x: seen.update({i: x}), stop=True)
        return seen

    plain, complete = load(), FrozenLM(name=name).load_with_head(device)
    eager, half = load(load={"attn_implementation": "eager"}), load(dtype="bfloat16")
    compiled = load(compile=True)
    causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool, device=device).tril()
    causal = causal.expand(BLOCKS, 1, CONTEXT, CONTEXT)

    @torch.no_grad()
    def with_head() -> Tensor:
        with nothing_padded():
            return complete.model(**complete.inputs(tokens)).logits

    def inference() -> dict[int, Tensor]:
        with torch.inference_mode():
            return run(plain)

    def other_products() -> dict[int, Tensor]:
        torch.set_float32_matmul_precision("medium")
        try:
            return run(plain)
        finally:
            torch.set_float32_matmul_precision("highest")

    expected = run(plain)
    for same in (run(plain, attention_mask=None), inference()):
        assert all(torch.equal(same[i], expected[i]) for i in expected)
    found = {
        BASE: lambda: run(plain),
        "stopped half way": lambda: run(plain, range(len(plain.blocks) // 2)),
        "with head and final norm": with_head,
        "without a mask of ones": lambda: run(plain, attention_mask=None),
        "causal mask written out": lambda: run(plain, attention_mask=causal),
        "attn_implementation=eager": lambda: run(eager),
        "inference_mode": inference,
        "dtype=bfloat16": lambda: run(half),
        "compile=true": lambda: run(compiled),
        'float32_matmul_precision="medium"': other_products,
    }
    if smallest():  # compiling takes a minute
        del found["compile=true"]
    return found


def main(arguments: list[str]) -> None:
    """Measure both models and write the table."""
    quiet()
    device = torch.device(options(arguments, device=("cpu", "cpu|cuda"))["device"])
    keep_freed_memory()
    shape = {"num_layers": 6, "d_model": 512, "num_heads": 8, "vocab_size": 50304}
    if smallest():
        shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "vocab_size": 1024}
    with random_model(**shape, context=CONTEXT) as folder:
        found = [
            interleaved(
                {what: timed(use, device) for what, use in variants(name, device).items()},
                ROUNDS,
                title,
            )
            for title, name in (("tiny", "tiny"), ("Pythia-70M's shape", folder))
        ]
    lines = ["| | tiny: ms, least | times | Pythia-70M's shape: ms, least | times |"]
    lines.append("|---|---|---|---|---|")
    for what in found[0]:
        cells = [
            f"{1000 * f[what].median:.0f}, {1000 * f[what].least:.0f} "
            f"| {f[what].least / f[BASE].least:.2f}"
            for f in found
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    write(
        "lm_forward",
        "One forward of the language model",
        "\n".join(lines),
        device,
        f"{BLOCKS} blocks of {CONTEXT} tokens, every layer shown; median and least of {ROUNDS} "
        "rounds, in which the variants follow each other. `times` is the ratio of the least to "
        f"that of `{BASE}`: float32, no head, scaled dot product attention, no_grad. Without the "
        "mask of ones, and in inference_mode, the activations are bit for bit the same.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
