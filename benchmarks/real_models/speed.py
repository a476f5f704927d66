"""What a forward of the real models costs, by dtype: `python -m benchmarks.real_models.speed`.

Processor time of one thread, the least of a few tries, so that other work on the machine matters
little. `cache=` and `models=` as in `python -m benchmarks.real_models`, which fetches the models.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.real_models.packages import fetched
from benchmarks.real_models.study import MODELS
from benchmarks.replication import table
from benchmarks.timing import machine, options
from groupsae.lm.load import FrozenLM
from groupsae.sae.topk import SELECTIONS, TopK

DTYPES = ("float32", "bfloat16", "float16")
PRODUCTS = ((2048, 2048, 2048), (2048, 640, 5120), (512, 640, 2048), (512, 2048, 640))


def least(use: Callable[[], Any], tries: int = 4) -> float:
    """Return the least processor time of a call, after one that is not counted."""
    found = []
    for _ in range(tries + 1):
        start = time.process_time()
        use()
        found.append(time.process_time() - start)
    return min(found[1:])


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Print the rates of products, of forwards, and of finding latents."""
    given = options(
        arguments,
        cache=(str(Path.home() / ".cache" / "groupsae-real-models"), ".+"),
        models=(",".join(MODELS), r"\w+(,\w+)*"),
    )
    torch.set_num_threads(1)
    rows = []
    for m, k, n in PRODUCTS:
        rates = []
        for dtype in (getattr(torch, name) for name in DTYPES):
            x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            rates.append(f"{2e-9 * m * k * n / least(lambda x=x, w=w: F.linear(x, w)):.0f}")
        rows.append([f"product {m} x {k} x {n}, GFLOP/s", *rates])
        x, w = torch.randn(m, k), torch.randn(n, k)
        packed = torch.ops.mkldnn._reorder_linear_weight(w, m)
        product = partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
        rows.append(["the same, weights packed once", f"{2e-9 * m * k * n / least(product):.0f}"])
    tokens = torch.randint(5, 30_000, (4, 256))
    for name in given["models"].split(","):
        folder = fetched(MODELS[name].folder, Path(given["cache"]))
        rates = []
        for dtype in DTYPES[:2] if folder else ():
            lm = FrozenLM(name=str(folder), dtype=dtype)
            hooked, last = lm.load(torch.device("cpu")), lm.geometry.num_layers - 1
            seconds = least(lambda h=hooked, x=last: h.acts(tokens, [x]), tries=2)
            rates.append(f"{tokens.numel() / seconds:,.0f}")
        rows.append([f"forward of {MODELS[name].title}, tokens/s", *rates])
    x, cells = torch.randn(2048, 512), []
    for selection in SELECTIONS:
        sae = TopK(d_model=512, d_sae=4096, k=32, selection=selection)
        cells.append(f"{1e3 * least(lambda s=sae: s.find(x, 32)):.0f}")
    rows.append(["TopK at S1: find the active latents, ms", *cells])
    width = len(DTYPES) + 1
    lines = [(row + [""] * width)[:width] for row in rows]
    print("\n".join(table(["one thread", *DTYPES], lines)))
    print(f"{machine(torch.device('cpu'))}.")


if __name__ == "__main__":
    main(sys.argv[1:])
