"""What every test stands on: shape checks, no network, fixed seeds, a small model and some text.

`groupsae` is imported inside the fixtures only: after the import hook stands.
"""

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import install_import_hook

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: each has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Types and shapes in signatures are checked in the tests, and only there; not in programs that a
# test starts. The other rooms (app, config, files, runtime) handle no arrays. (As an option of
# jaxtyping's own pytest plugin this would have to be `beartype.beartype` with its defaults, which
# takes no int for a float.)
CHECKED = (
    "cost", "data", "evaluation", "grouping", "interop", "interpretation", "lm", "reporting",
    "sae", "suite", "training",
)  # fmt: skip
install_import_hook(
    [f"groupsae.{room}" for room in CHECKED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def _is_near(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    return host in (None, "", socket.gethostname()) or str(host).startswith(LOOPBACK)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection beyond this machine; processes of one test may talk together."""
    patch = pytest.MonkeyPatch()

    def guarded(name: str) -> Any:
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            inet = self.family in (socket.AF_INET, socket.AF_INET6)
            if inet and not _is_near(address[0]):
                raise OSError(f"a test tried to reach {address[0]}: tests use no network")
            return original(self, address)

        return connect

    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_near(host):
            raise socket.gaierror(f"a test tried to look up {host}: tests use no network")
        return lookup(host, *args, **kwargs)

    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, guarded(name))
    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _sentences(number: int, count: int) -> str:
    """Return Python-like text that is the same on every machine: small vocabulary, real syntax."""
    chance = random.Random(number)
    names = [f"{a}_{b}" for a in ("sum", "max", "row", "key") for b in ("of", "in", "at", "by")]
    lines = [f'"""Module {number}."""', ""]
    for _ in range(count):
        name, first, second = chance.choice(names), chance.choice("abcdef"), chance.choice("xyz")
        lines += [
            f"def {name}_{chance.randrange(90)}({first}, {second}):",
            f"    return {first} {chance.choice('+-*/')} {second} ** {chance.randrange(9)}",
            "",
        ]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 120 text files of about 3 kB: for `FileSource(path=str(tiny_text))`."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(120):
        (folder / f"{number:03}.txt").write_text(_sentences(number, 48), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """Return a folder with a random GPT-NeoX: 4 layers, d_model 32, context 64, 512 tokens.

    For `lms.frozen(tiny_lm)`. The weights are scaled up so that the layers differ: those of a
    fresh model leave the residual stream nearly as it was.
    """
    import torch

    from benchmarks.pretraining.model import build_gpt_neox, train_tokenizer

    folder = tmp_path_factory.mktemp("lm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = build_gpt_neox(num_layers=4, d_model=32, num_heads=4, vocab_size=512, context=64)
        with torch.no_grad():
            for block in lm.gpt_neox.layers:
                for parameter in block.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(8)
    lm.save_pretrained(folder)
    texts = [file.read_text(encoding="utf-8") for file in sorted(tiny_text.glob("*.txt"))]
    train_tokenizer(texts, 512, 64).save_pretrained(folder)
    return folder
