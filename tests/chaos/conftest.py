"""The undisturbed run that every fault is compared with, and the table of docs/reliability.md."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from tests.chaos.program import SEVERAL, Program, Warm

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
HEAD = ["fault", "promised", "seen", "tokens lost", "seconds"]
ROWS: dict[str, list[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="write the table of all faults into this page")


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return what a test that got through writes its row of the table with."""
    began = time.monotonic()

    def write(fault: str, promised: str, seen: str, lost: int | str = 0) -> None:
        seconds = f"{time.monotonic() - began:.0f}"
        ROWS[request.node.nodeid] = [fault, promised, seen, str(lost), seconds]

    return write


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    page = session.config.getoption("--table", None)
    if page is None or exitstatus != 0:
        return
    cores = len(os.sched_getaffinity(0))
    lines = [
        BEGIN,
        f"{date.today().isoformat()}, {cores} CPU cores, `make chaos`: "
        "every line is one or more tests that passed.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(cells) + " |" for cells in ROWS.values()),
        END,
    ]
    path = Path(page)
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + "\n".join(lines) + rest.partition(END)[2])


@pytest.fixture(scope="session")
def program(
    tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Program]]:
    """Return a maker of commands, each with an output folder of its own."""
    warm = Warm()

    def make(*more: str) -> Program:
        return Program(warm, tiny_lm, tiny_text, tmp_path_factory.mktemp("chaos"), *more)

    yield make
    warm.close()


@pytest.fixture(scope="session")
def undisturbed(program: Callable[..., Program]) -> Program:
    """Return a run that nothing happened to; `moments` next to its output lists its steps."""
    made = program()
    done = made.run(record=str(made.place / "moments"))
    assert done.status == 0, done.output
    return made


@pytest.fixture(scope="session")
def expected(undisturbed: Program) -> dict:
    """Return what that run gave."""
    return undisturbed.results()


@pytest.fixture(scope="session", params=["ddp", "sae_parallel"])
def of_two(request: pytest.FixtureRequest, program: Callable[..., Program]) -> tuple[str, dict]:
    """Return a trainer for several processes, and what two of them give undisturbed."""
    made = program(f"trainer={request.param}", *SEVERAL)
    done = made.run()
    assert done.status == 0, done.output
    return request.param, made.results()
