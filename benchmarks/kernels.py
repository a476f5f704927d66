"""From which share of active latents on dense products win: `python -m benchmarks.kernels`.

The sums of a training step (decoding, the latents' gradient, both weights' gradients) by the
sparse kernels of the device and by dense products, for several shares; the rule in
groupsae/sae/kernels/dispatch.py is read off here. `device=cuda` measures a GPU. A minute on two
cores; `size=smallest` takes a second. Writes benchmarks/results/kernels.md, with the options in
its name.
"""

import sys
from types import ModuleType

import torch

from benchmarks.timing import Seconds, interleaved, options, smallest, timed, write
from groupsae.runtime.memory import keep_freed_memory
from groupsae.sae.kernels import dense
from groupsae.sae.kernels.dispatch import kernels_of
from groupsae.sae.sparse import Entries

SHAPES = {"cpu": [(128, 1024, 2048), (512, 4096, 1024)], "cuda": [(768, 12288, 8192)]}
TINY = [(16, 64, 32)]
SHARES = [1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
ROUNDS = 5


def measured(
    d_model: int, d_sae: int, batch: int, share: float, device: torch.device
) -> dict[str, Seconds]:
    """Return the seconds of a step's four sums by both kinds of kernel."""
    source = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, device=device)

    k = round(share * d_sae)
    pre_acts = draw(batch, d_sae)
    entries = Entries.of_rows(pre_acts.topk(k, dim=1).indices, d_sae)
    acts, table, x = draw(batch * k), draw(d_sae, d_model), draw(batch, d_model)
    order, rows, starts = entries.by_latent
    sorted_acts = acts[order]

    def sums(kernels: ModuleType) -> None:
        kernels.combine(acts, entries.latents, entries.starts, table)
        kernels.dots(x, table, entries.starts, entries.latents)
        for _ in ("decoder", "encoder"):
            kernels.combine(sorted_acts, rows, starts, x)

    uses = {"sparse": lambda: sums(kernels_of(table)), "dense": lambda: sums(dense)}
    blocks = {name: timed(use, device) for name, use in uses.items()}
    return interleaved(blocks, ROUNDS, f"{d_model} x {d_sae}, share {share:.3f}")


def main(arguments: list[str]) -> None:
    """Measure every shape and share and write the table."""
    given = options(arguments, device=("cpu", "cpu|cuda"))
    device = torch.device(given["device"])
    keep_freed_memory()
    lines = []
    for shape in TINY if smallest() else SHAPES[device.type]:
        found = [measured(*shape, share, device) for share in SHARES]
        names = list(found[0])
        lines += [
            f"## d_model {shape[0]}, d_sae {shape[1]:,}, batch {shape[2]:,}",
            "",
            f"| share active | {' | '.join(f'{name}, ms' for name in names)} | dense / sparse |",
            f"|---|{'---|' * (len(names) + 1)}",
        ]
        for share, each in zip(SHARES, found, strict=True):
            cells = " | ".join(f"{1000 * each[name].median:.2f}" for name in names)
            ratio = each["dense"].median / each["sparse"].median
            lines.append(f"| 1/{1 / share:.0f} | {cells} | {ratio:.2f} |")
        lines.append("")
    write(
        "kernels",
        "Sparse and dense kernels",
        "\n".join(lines).rstrip(),
        device,
        f"The four sums over active latents of one step; medians of {ROUNDS} rounds, in which the "
        "kinds follow each other.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
