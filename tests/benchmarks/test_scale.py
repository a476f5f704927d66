"""The simulation behind docs/scale.md, where its outcome can be computed by hand."""

from pathlib import Path

import pytest

from benchmarks.scale import MODELS, Speed, Times, figures, simulate, tables
from benchmarks.timing import RESULTS

DOCS = Path(__file__).parents[2] / "docs"


def test_one_process_does_everything_one_after_the_other() -> None:
    assert simulate(Times([1.0, 1.0], [0.0, 0.0], [3.0], 0.0)) == pytest.approx(5)


def test_rows_travel_during_the_next_forward() -> None:
    hidden = simulate(Times([2.0, 2.0], [1.0, 1.0], [3.0, 3.0], 0.0))
    assert hidden == pytest.approx(2 + 2 + 1 + 3)  # only the last part is waited for
    assert simulate(Times([1.0, 1.0], [4.0, 4.0], [3.0, 3.0], 0.0)) == pytest.approx(1 + 8 + 3)


def test_the_slowest_owner_sets_the_pace() -> None:
    assert simulate(Times([1.0], [0.5], [1.0, 4.0], 0.0)) == pytest.approx(1 + 0.5 + 4)


def test_gradients_are_added_up_during_half_of_the_step() -> None:
    assert simulate(Times([1.0], [0.0], [4.0, 4.0], 1.5)) == pytest.approx(5)
    assert simulate(Times([1.0], [0.0], [4.0, 4.0], 3.0)) == pytest.approx(6)


def test_ddp_moves_gradients_and_sae_parallel_rows() -> None:
    model, speed = MODELS[0], Speed()
    ddp, spread = (figures(model, 8, mode, speed) for mode in ("ddp", "sae_parallel"))
    weights = 2 * 2048 * 32768 + 32768 + 2048
    assert ddp.moved == 2 * 7 / 8 * 4 * weights * 9
    assert spread.moved == 32768 / 8 * 9 * 2 * 2048 * 7 / 8
    assert spread.memory < ddp.memory
    alone = figures(model, 1, "ddp", speed)
    assert alone == figures(model, 1, "sae_parallel", speed)


@pytest.mark.parametrize("file", [DOCS / "scale.md", RESULTS / "scale.md"], ids=lambda f: f.name)
def test_documentation_shows_what_the_simulation_gives(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace("### ", "## ")
    for line in tables(Speed()).splitlines():
        assert line in text, line
