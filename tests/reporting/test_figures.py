"""Figures: which there are, and what must be right in them."""

from pathlib import Path
from typing import Any

from groupsae.reporting.figures import evaluation_figures, linkage_tree, quality
from groupsae.reporting.load import read_run
from tests.helpers.report_run import change, distances, write_run


def test_evaluation_figures_are_those_of_the_evaluation(tmp_path: Path):
    few, many = (
        {
            each.name
            for each in evaluation_figures(
                read_run(write_run(tmp_path / name, every=name == "all"))
            )
        }
        for name in ("one", "all")
    )
    assert few == {"fvu_layers", "delta_ce_layers", "profiles", "density"}
    assert few < many
    assert "distances" not in many


def test_no_line_turns_back_even_if_more_even_groups_have_larger_angles(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)

    def larger(values: dict[str, Any]) -> None:
        next(g for g in values["groupings"] if g["name"] == "even-4")["amad"] = 0.3

    change(folder, larger)
    axes = quality(read_run(folder), "fvu", "amad").axes[0]
    (line,) = (each for each in axes.lines if each.get_label() == "evenly spaced")
    x = line.get_xdata()
    assert len(x) > 3
    assert list(x) == sorted(x)


def test_the_dendrogram_keeps_the_layers_in_order():
    axes = linkage_tree(distances()[:11, :11], [[0, 1, 2], list(range(3, 11))]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map(str, range(11)))
