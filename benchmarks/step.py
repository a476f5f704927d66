"""An SAE's training step by part, against the floor: `python -m benchmarks.step [device=cuda]`.

The floor is the encoder's dense product and one pass of Adam, both measured alone in the same run.
Parts are measured alone, on the latents of a fresh group; the whole step is a `GroupSAE`'s as in
training, with counters, AuxK at hand, projection, clipping, Adam and normalisation. Beside them
the same step in plain PyTorch: dense decoding, gradients by autograd, Adam as it is by default.

On a GPU also its roofline, in the same run: a product of the encoder's shape in bfloat16, and a
copy from device memory to device memory. From the two come a dense floor (that product) and a
bytes floor (what Adam and the sums over active latents move, at the copy's rate).

    python -m benchmarks.step                             # CPU, float32: two minutes on two cores
    python -m benchmarks.step selection=bfloat16          # latents found in bfloat16
    python -m benchmarks.step dead=1000                   # with AuxK at work
    python -m benchmarks.step device=cuda selection=bfloat16
    python -m benchmarks.step size=smallest               # seconds, for CI

Writes benchmarks/results/step.md, with the options in its name.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Seconds, interleaved, options, smallest, timed, write
from groupsae.runtime.memory import keep_freed_memory
from groupsae.sae.kernels.dispatch import affine, top_k
from groupsae.sae.topk import SELECTIONS, TopK
from groupsae.training.group import GroupSAE
from groupsae.training.optim import Adam


class Shape(NamedTuple):
    """Sizes of a step."""

    d_model: int
    d_sae: int
    k: int
    batch: int


SHAPES = {
    "cpu": [Shape(512, 4096, 32, 2048), Shape(768, 12288, 64, 2048)],
    "cuda": [
        Shape(d, n, 128, batch)
        for d, n in ((768, 12288), (1024, 16384), (2048, 32768))
        for batch in (8192, 32768)
    ],
}
TINY = [Shape(16, 64, 4, 64)]
ROUNDS, CALLS = 7, 3
FLOOR = ("encoder's product", "Adam")
WHOLE, PLAIN = "whole step", "the same in plain PyTorch"
PRODUCT, COPY = "bfloat16 product", "device copy"
COPIED = 2**30  # bytes: far more than any cache holds
FLOAT = 4  # bytes
ADAM = 28  # bytes per parameter: gradient read, weight and two moments read and written
SUMS = 4  # over active latents: decoding, the latents' gradient, both weights' gradients


def activations(shape: Shape) -> Tensor:
    """Return rows that a dictionary explains: 16 of 4 d directions each, and noise."""
    source = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4 * shape.d_model, shape.d_model, generator=source))
    chosen = torch.rand(shape.batch, 4 * shape.d_model, generator=source).topk(16).indices
    weights = torch.rand(shape.batch, 16, generator=source) + 0.5
    x = F.embedding_bag(chosen, directions, mode="sum", per_sample_weights=weights)
    x += 0.05 * torch.randn(x.shape, generator=source)
    return x / x.norm(dim=1).mean()


def group_of(shape: Shape, selection: str, device: torch.device) -> GroupSAE:
    """Return a group as training makes it."""
    make = functools.partial(TopK, d_sae=shape.d_sae, k=shape.k, selection=selection)
    return GroupSAE(
        name="layers.0", layers=[0], norm_factors={0: 1.0}, sae=make, d_model=shape.d_model,
        optim=Adam(), dead_after=10**9, b_dec_start="zero", nonfinite="stop", seed=0,
    ).to(device)  # fmt: skip


def whole_step(group: GroupSAE, acts: Tensor, dead: int) -> Callable[[], None]:
    """Return a step as training does it; some latents are dead all the time."""
    optimizer, layers = group.configure_optimizers(), acts.new_zeros(len(acts)).long()

    def step() -> None:
        group.tokens_since_fired[:dead] = group.dead_after
        x = group.scaled(acts, layers)
        loss = group.step(x, layers, group.moments(x, layers), num_dead=dead)
        group.count_dead(group.fired > 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(shape: Shape, acts: Tensor) -> Callable[[], None]:
    """Return what one would write without thinking of cost."""
    weights = F.normalize(torch.randn(shape.d_sae, shape.d_model, device=acts.device))
    W_enc, W_dec = nn.Parameter(weights), nn.Parameter(weights.clone())
    b_enc = nn.Parameter(acts.new_zeros(shape.d_sae))
    b_dec = nn.Parameter(acts.new_zeros(shape.d_model))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=2e-4)

    def step() -> None:
        pre_acts = F.linear(acts - b_dec, W_enc, b_enc).relu()
        values, indices = pre_acts.topk(shape.k, dim=1)
        latents = torch.zeros_like(pre_acts).scatter(1, indices, values)
        loss = (latents @ W_dec + b_dec - acts).square().sum() / acts.var(dim=0).sum()
        loss.backward()
        with torch.no_grad():
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec)
        nn.utils.clip_grad_norm_([W_enc, W_dec, b_enc, b_dec], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


@torch.no_grad()
def parts_of(group: GroupSAE, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the parts of a step, each alone, on the latents that the group finds now."""
    sae = group.sae
    assert isinstance(sae, TopK)
    latents, pre_acts = sae.find(x, sae.k)
    entries, acts = latents.entries(sae.d_sae), latents.acts.flatten()
    order, rows, starts = entries.by_latent
    kernels = entries.kernels(sae.W_dec)
    for parameter in sae.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = group.configure_optimizers()
    low = torch.bfloat16 if sae.selection == "bfloat16" else torch.float32
    x_low, W_low, b_low = x.to(low), sae.W_enc.to(low), sae.b_enc.to(low)
    sorted_acts = acts[order]

    def rows_of_a_weight() -> Tensor:
        return kernels.combine(sorted_acts, rows, starts, x)

    parts: dict[str, Callable[[], Any]] = {
        "encoder's product": lambda: affine(x_low, W_low, b_low),
        "choosing k": lambda: top_k(pre_acts, sae.k),
        "decoding": lambda: kernels.combine(acts, entries.latents, entries.starts, sae.W_dec),
        "gradient of the latents": lambda: kernels.dots(
            x, sae.W_dec, entries.starts, entries.latents
        ),
        "entries by latent": lambda: latents.entries(sae.d_sae).by_latent,
        "decoder's gradient": rows_of_a_weight,
        "encoder's gradient": rows_of_a_weight,
        "projection": sae.project_gradient,
        "clipping": lambda: nn.utils.clip_grad_norm_(sae.parameters(), 1.0),
        "Adam": functools.partial(torch.optim.Adam.step, optimizer),
        "normalisation": sae.normalize_decoder,
    }
    if low != torch.float32:
        parts["weights to bfloat16"] = lambda: sae.W_enc.to(low)
        candidates = sae.select(pre_acts, 2 * sae.k)
        again = candidates.entries(sae.d_sae)
        parts["candidates in float32"] = lambda: kernels.dots(
            x, sae.W_enc, again.starts, again.latents
        )
        parts["choosing k"] = lambda: (
            sae.select(pre_acts, 2 * sae.k),
            top_k(candidates.acts, sae.k),
        )
    return parts


def roofline(shape: Shape, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return what shows the most that a device can do: a product of the shape, and a copy."""
    x, weight = (
        torch.randn(rows, shape.d_model, device=device, dtype=torch.bfloat16)
        for rows in (shape.batch, shape.d_sae)
    )
    product = torch.empty(shape.batch, shape.d_sae, device=device, dtype=torch.bfloat16)
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {
        PRODUCT: lambda: torch.mm(x, weight.T, out=product),
        COPY: lambda: target.copy_(source),
    }


def floors(shape: Shape, found: dict[str, Seconds]) -> list[str]:
    """Return the lines on what the roofline allows, and how far the step is from it.

    Of the bytes of the touched rows there are two counts: k rows a token in each of the four sums,
    as if no row were found in a cache; and every row of the weights, of their gradients and of the
    batch once in a sum, as if all were. Device memory sees something in between.
    """
    d, n, k, batch = shape
    dense, step = found[PRODUCT].median, found[WHOLE].median
    rate = 2 * COPIED / found[COPY].median  # bytes are read and written
    adam = ADAM * (2 * d * n + d + n) / rate
    each_time = SUMS * batch * k * d * FLOAT / rate
    once = SUMS * (min(n, batch * k) + batch) * d * FLOAT / rate
    encoder = found["encoder's product"].median
    low, high = dense + adam + once, dense + adam + each_time
    return [
        f"Roofline: {2 * d * n * batch / dense / 1e12:,.0f} TFLOP/s in bfloat16, "
        f"{rate / 1e9:,.0f} GB/s. Dense floor {1000 * dense:.2f} ms; the encoder's product runs "
        f"at {dense / encoder:.0%} of its rate. Bytes floor: Adam {1000 * adam:.2f} ms, and the "
        f"touched rows {1000 * each_time:.2f} ms where each is fetched every time "
        f"({1000 * once:.2f} where it is once in a sum). Whole step / (dense floor + bytes "
        f"floor): {step / high:.2f} ({step / low:.2f}).",
        "",
    ]


def table(found: dict[str, Seconds]) -> list[str]:
    """Return the lines of one shape's table, and the ratios below it."""
    whole = found[WHOLE].median
    parts = {n: s for n, s in found.items() if n not in (WHOLE, PLAIN, PRODUCT, COPY)}
    summed = sum(s.median for s in parts.values())
    floor = sum(parts[name].median for name in FLOOR)
    rest = [("sum of the parts", summed), (WHOLE, whole), (PLAIN, found[PLAIN].median)]
    rows = [*((name, s.median) for name, s in parts.items()), *rest]
    return [
        "| | ms | of the step |",
        "|---|---|---|",
        *(f"| {name} | {1000 * s:.2f} | {s / whole:.0%} |" for name, s in rows),
        "",
        f"Whole step / sum of the parts: {whole / summed:.2f}. Whole step / floor (encoder's "
        f"product and Adam): {whole / floor:.2f}. Plain PyTorch / whole step: "
        f"{found[PLAIN].median / whole:.2f}.",
        "",
    ]


def main(arguments: list[str]) -> None:
    """Measure every shape and write the tables."""
    given = options(
        arguments,
        device=("cpu", "cpu|cuda"),
        selection=("float32", "|".join(SELECTIONS)),
        dead=("0", "[0-9]+"),
    )
    device, dead = torch.device(given["device"]), int(given["dead"])
    selection = given["selection"]
    keep_freed_memory()
    lines: list[str] = []
    for shape in TINY if smallest() else SHAPES[device.type]:
        acts = activations(shape).to(device)
        group = group_of(shape, selection, device)
        step = whole_step(group, acts, dead)
        for _ in range(5):
            step()
        # of another group: its gradients stay
        parts = parts_of(group_of(shape, selection, device), acts)
        blocks = {name: timed(use, device, CALLS) for name, use in parts.items()}
        blocks[WHOLE] = timed(step, device, CALLS)
        blocks[PLAIN] = timed(plain_step(shape, acts), device, CALLS)
        if device.type == "cuda":
            top = roofline(shape, device)
            blocks |= {name: timed(use, device, CALLS) for name, use in top.items()}
        title = (
            f"d_model {shape.d_model}, d_sae {shape.d_sae:,}, k {shape.k}, batch {shape.batch:,}"
        )
        found = interleaved(blocks, ROUNDS, title)
        lines += [f"## {title}", "", *table(found)]
        if device.type == "cuda":
            lines += floors(shape, found)
    write(
        "step",
        "One training step of an SAE, by part",
        "\n".join(lines).rstrip(),
        device,
        f"Medians of {ROUNDS} rounds, in which parts, whole and plain PyTorch follow each other; "
        f"{CALLS} calls each. The parts are those of a fresh group.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
