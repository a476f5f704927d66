"""The tables and the summary of a run: known numbers in, the same numbers out."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from groupsae.reporting import tables
from groupsae.reporting.downstream import lost_table
from groupsae.reporting.load import RunFiles, read_run
from groupsae.reporting.page import provenance, summary
from tests.helpers.report_run import change, near, write_run


def baselines(folder: Path, against: str = "even-2") -> dict[str, dict[str, Any]]:
    """Return metric -> the row of the comparison with one baseline."""
    table = tables.baselines_table(read_run(folder))
    assert table is not None
    rows = table.frame[table.frame["baseline"] == against].to_dict("records")
    return {row["metric"]: row for row in rows}


def texts_of(folder: Path) -> str:
    """Return all sentences of the summary, with plain spaces."""
    section = summary(read_run(folder))
    texts = [section.headline, *section.notes, *section.caveats]
    return "\n".join(texts).replace("\N{NO-BREAK SPACE}", " ")


def tiles_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Return label -> value and note."""
    return {
        tile.label.replace("\N{NO-BREAK SPACE}", " "): (tile.value, tile.note)
        for tile in summary(read_run(folder)).tiles
    }


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny" / "amad-0.2" / "s0")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny" / "all" / "s0", every=True)


# ---- against baselines --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "width", "answer"),
    [(0.1, 0.001, "yes: better"), (-0.1, 0.001, "yes: worse"), (0.004, 0.02, "no")],
)
def test_whether_even_spacing_is_distinguishable(tmp_path: Path, gap, width, answer):
    folder = write_run(tmp_path / "r", every=True, even_gap=gap, width=width)
    assert baselines(folder)["FVU"]["distinguishable"] == answer


def test_a_comparison_has_the_numbers_of_the_evaluation(every: Path):
    values = json.loads((every / "evaluation" / "evaluation.json").read_text())
    lost = values["groupings"][0]["against_per_layer"]
    pairs = {(row["grouping"], row["baseline"]): row for row in values["comparisons"]}
    for baseline, expected in (
        ("per_layer", lost),
        ("even-2", pairs["complete-2", "even-2"]),
        ("smaller-2", pairs["complete-2", "smaller-2"]),
    ):
        for metric, heading in (("fvu", "FVU"), ("delta_ce", "ΔCE, nats")):
            row = baselines(every, baseline)[heading]
            ends = [row[key] for key in ("difference", "difference_low", "difference_high")]
            assert ends == list(expected[metric].values())


def test_metrics_may_differ_in_the_answer(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)
    row = {"grouping": "complete-2", "baseline": "even-2", "delta_ce_percent": None}
    row |= {"fvu": near(-0.01, 0.02), "delta_ce": near(0.01, 0.002)}
    change(folder, lambda values: values.update(comparisons=[row]))
    found = baselines(folder)
    assert found["FVU"]["difference"] == -0.01
    assert found["FVU"]["distinguishable"] == "no"
    assert found["ΔCE, nats"]["distinguishable"] == "yes: worse"
    assert "ΔCE, %" not in found


def test_without_intervals_nothing_is_called_distinguishable_or_not(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)

    def drop(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, dict) and "low" in inner:
                inner["low"] = inner["high"] = None
            elif isinstance(inner, dict | list):
                drop(inner)

    change(folder, drop)
    assert not {"distinguishable", "difference_low"} & set(baselines(folder)["FVU"])


def test_a_run_without_baselines_has_no_comparison(ordinary: Path):
    assert tables.baselines_table(read_run(ordinary)) is None


# ---- the summary --------------------------------------------------------------------------------


def test_the_summary_has_the_numbers_of_the_evaluation(every: Path):
    chosen = json.loads((every / "evaluation" / "evaluation.json").read_text())["groupings"][0]
    lost, saved = chosen["against_per_layer"]["fvu"], 1 - chosen["cost"]["flops"]
    text, tiles = texts_of(every), tiles_of(every)
    assert f"save {100 * saved:.1f} % of the FLOPs" in text
    ends = f"{lost['low']:.4f} to {lost['high']:.4f}"
    assert f"FVU lost: {lost['value']:.4f} ({ends})" in text
    assert tiles["FVU lost against one SAE per layer"] == (f"{lost['value']:.4f}", ends)
    assert tiles["groups"] == ("2", "AMAD 0.178")
    assert "AMAD below θ = 0.2 chose 2 groups of layers (0–2 · 3–10)." in text
    assert "The last layer has its own SAE." in text
    assert "This is one training run (seed 0)" in text
    assert "128 sequences from 30 documents" in text


def test_without_baselines_the_summary_names_the_command(ordinary: Path):
    assert "groups=all trains every number of groups and the baselines" in texts_of(ordinary)
    assert tiles_of(ordinary)["FVU"] == ("0.1729", "0.1689 to 0.1769")


def test_without_evaluation_the_summary_names_the_command(tmp_path: Path):
    folder = write_run(tmp_path / "r", evaluated=False)
    assert f"python -m groupsae.evaluate run={folder}" in texts_of(folder)
    assert tiles_of(folder)["FVU"] == ("0.1860", "")


def test_a_negative_saving_is_called_a_cost(tmp_path: Path):
    folder = write_run(tmp_path / "r")
    change(folder, lambda values: values["groupings"][0]["cost"].update(flops=1.05))
    assert "cost 5.0 % more FLOPs than one SAE per layer" in texts_of(folder)


def test_a_missing_baseline_is_named_with_the_option_that_trains_it(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)

    def drop(values: dict[str, Any]) -> None:
        kept = [g for g in values["groupings"] if "even" not in g["rules"] or g["num_groups"] > 10]
        values["groupings"] = kept

    change(folder, drop)
    assert "Evenly spaced groups were not trained: groups.rules=[complete,even]" in texts_of(
        folder
    )


def test_imported_saes_have_no_angles_seed_or_command(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    file = folder / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adopted": "theirs"}))
    text = texts_of(folder)
    assert "imported from theirs" in text
    assert "AMAD" not in text + str(tiles_of(folder))
    assert "training run" not in text
    facts = provenance(read_run(folder))
    assert facts["imported from"] == "theirs"
    assert "command" not in facts


def test_a_model_without_next_tokens_has_no_cross_entropy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")

    def without_ce(evaluation: dict[str, Any]) -> None:
        evaluation["ce"] = None
        for grouping in evaluation["groupings"]:
            grouping["grouped_layers"].update(delta_ce=None, delta_ce_percent=None)

    change(folder, without_ce)
    table = tables.groupings_table(read_run(folder))
    assert table is not None
    assert {"fvu", "flops"} < set(table.columns)
    assert not {"delta_ce", "delta_ce_percent"} & set(table.columns)
    assert tables.scale_table(read_run(folder)) is None
    assert "predicts no next token" in texts_of(folder)
    assert "nats" not in texts_of(folder) + str(tiles_of(folder))

    def with_embeddings(evaluation: dict[str, Any]) -> None:
        evaluation["retrieval"] = {"value": 0.75, "low": None, "high": None}
        for layer in evaluation["layers"]:
            layer |= {"embedding_loss_zero": 0.9, "ce_zero": None, "ce_mean": None}
        for grouping in evaluation["groupings"]:
            grouping["grouped_layers"]["embedding_loss"] = 0.25

    change(folder, with_embeddings)
    scale = tables.scale_table(read_run(folder))
    assert scale is not None
    assert "0.7500" in scale.caption
    assert set(scale.frame["embedding_loss_zero"]) == {0.9}
    table = tables.groupings_table(read_run(folder))
    assert table is not None
    assert set(table.frame["embedding_loss"]) == {0.25}


def test_what_an_encoder_loses_is_its_embeddings_in_place_of_cross_entropy() -> None:
    loss = {"value": 0.125, "low": 0.1, "high": 0.2}
    against = {"fvu": loss, "embedding_loss": loss, "retrieval_loss": loss}
    run = RunFiles(
        evaluation={"groupings": [{"against_per_layer": against}]},
        downstream={"probes": {"groupings": []}},
    )
    lost = lost_table(run)
    assert lost is not None
    assert lost.frame["metric"].tolist() == ["FVU", "1 − cos"]
    assert set(lost.frame["distinguishable"]) == {"yes: worse"}


# ---- one table at a time ------------------------------------------------------------------------


def test_cells_have_fixed_digits_and_the_interval_as_a_note(every: Path):
    table = tables.layers_table(read_run(every))
    assert table is not None
    assert table.cell(0, "layer")[:3] == ("0", "", True)
    assert table.cell(0, "fvu")[:3] == ("0.1300", "0.1260 to 0.1340", False)
    assert table.cell(0, "fvu", half=True)[:3] == ("0.1300 ±0.0040", "", False)
    assert table.cell(0, "l0")[:3] == ("16.0", "", False)
    assert len(table.rows) == 12 + 2 + 2  # layers, shared SAEs, and the grouped and all layers
    assert list(table.marked) == [12, 13, 14, 15]
    assert table.cell(14, "sae").value == "grouped layers"
    assert table.cell(14, "fvu")[:3] == ("0.1729", "0.1689 to 0.1769", False)


def test_the_scale_of_the_ce_score(every: Path):
    table = tables.scale_table(read_run(every))
    assert table is not None
    assert "CE is 2.7000 nats (2.6800 to 2.7200)" in table.caption
    assert [cell.value for cell in table.rows[1]] == ["1", "9.0000", "6.0000", "2.00"]


def test_the_chosen_grouping_is_one_even_if_theta_picks_one_of_every_rule(tmp_path: Path):
    folder = write_run(tmp_path / "r", every=True)
    even = "even-3"

    def choose(values: dict[str, Any]) -> None:
        next(g for g in values["groupings"] if g["name"] == even).update(chosen_by=["even"])

    change(folder, choose)
    table = tables.groupings_table(read_run(folder))
    assert table is not None
    chosen = table.frame[table.frame["rules"].str.contains("chosen")]
    assert list(chosen["grouping"]) == ["complete-2"]
    assert table.marked == [0]


def test_the_predicted_loss_stands_next_to_the_measured_one(every: Path, tmp_path: Path):
    run = read_run(every)
    frame = tables.groupings_table(run).frame.set_index("grouping")
    alone = run.per_layer["grouped_layers"]["fvu"]["value"]
    grouped = [g for g in run.groupings if g["kind"] == "groups"]
    for grouping in grouped:
        predicted = frame["fvu_lost_predicted"][grouping["name"]]
        assert predicted == pytest.approx(2.4 * grouping["variance"] * alone)
    others = frame["fvu_lost_predicted"].drop([g["name"] for g in grouped])
    assert others.isna().all()
    for grouping in run.groupings:  # as evaluated by an earlier version
        del grouping["variance"]
    assert "fvu_lost_predicted" not in tables.groupings_table(run).frame


def test_the_caption_of_one_grouping_promises_no_others(ordinary: Path, every: Path):
    one, many = (tables.groupings_table(read_run(folder)) for folder in (ordinary, every))
    assert one is not None
    assert many is not None
    assert one.caption.startswith("Mean over the grouped layers")
    assert many.caption.startswith("Every grouping")


def test_largest_angles_are_those_of_the_distances(ordinary: Path):
    run = read_run(ordinary)
    table = tables.groups_table(run)
    assert table is not None
    assert run.distances is not None
    assert table.frame["diameter"][1] == run.distances[3:11, 3:11].max()
    assert table.cell(2, "diameter").value == "–"  # a single layer has none
    assert table.cell(0, "tokens_per_layer").value == "341,333"
    assert table.cell(3, "fvu").value == "0.1860"


def test_the_ledger_lists_parts_savings_and_sharing(every: Path):
    run = read_run(every)
    parts, saved = tables.parts_table(run), tables.saved_table(run)
    sharing = tables.sharing_table(run)
    assert parts is not None
    assert saved is not None
    assert sharing is not None
    assert [cell.value for cell in parts.rows[0]] == [
        "language model",
        "5.2 TFLOP",
        "5.3 TFLOP",
        "61\N{NO-BREAK SPACE}s",
    ]
    assert list(parts.frame["part"])[-2:] == ["evaluation", "instead: one SAE per layer"]
    assert list(saved.frame["saved"]) == [0.346, 0.41, 0.595, 0.54]
    assert sharing.cell(0, "factor").value == "6.60"


def test_a_table_without_rows_is_left_out_and_so_is_an_empty_column():
    assert tables.build("x", "x", []) is None
    table = tables.build("x", "x", [{"sae": "a", "fvu": None}, {"sae": "b", "fvu": None}])
    assert table is not None
    assert list(table.frame) == ["sae"]


def test_csv_files_hold_the_plain_values(every: Path):
    from groupsae.reporting.page import write_report

    write_report([every])
    frame = pd.read_csv(every / "report" / "layers.csv")
    results = json.loads((every / "evaluation" / "evaluation.json").read_text())["results"]
    first = next(r for r in results if (r["sae"], r["layer"]) == ("layers.0-2", 0))
    stored = frame.iloc[0][["fvu", "fvu_low", "fvu_high"]].tolist()
    assert stored == list(first["fvu"].values())
