"""From sums to figures: means over layers, paired differences, similarity, cost, and the files."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groupsae.data.filters import TokenFilter
from groupsae.evaluation.heldout import HeldoutSums, run_heldout
from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.results import AVERAGED, COMPARED, Results
from groupsae.grouping.groupings import Grouping
from groupsae.grouping.partition import build_partition
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite, load_suite
from tests.helpers.evaluated import evaluate, evaluated, read
from tests.helpers.lms import frozen

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return lambda kind: evaluated(kind, tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


@pytest.fixture
def everything(folder: Folder) -> dict[str, Any]:
    return read(folder("all"))


def by_name(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in evaluation["groupings"]}


def row(evaluation: dict[str, Any], sae: str, layer: int) -> dict[str, Any]:
    (found,) = (r for r in evaluation["results"] if (r["sae"], r["layer"]) == (sae, layer))
    return found


# ---- groupings --------------------------------------------------------------------------------


def test_every_grouping_is_there_with_the_chosen_one_first(everything: dict[str, Any]) -> None:
    found = by_name(everything)
    first = everything["groupings"][0]
    assert first["kind"] == "groups"
    assert "complete" in first["chosen_by"]
    assert {"per_layer", "smaller-1", "smaller-2"} < set(found)
    for rule in ("complete", "even"):
        counts = [g["num_groups"] for g in found.values() if rule in g["rules"]]
        assert sorted(counts) == [1, 2, 3]  # 1 to L - 1, the last layer standing alone
    for each in found.values():
        assert set(each["sae_of_layer"]) == {"0", "1", "2", "3"}
        assert each["sae_of_layer"]["3"] == "layers.3"  # the last layer alike in all of them
        assert set(each["saes"]) == set(each["sae_of_layer"].values())
        if each["kind"] != "smaller":
            owners = {x: f"layers.{g[0]}" + (f"-{g[-1]}" if len(g) > 1 else "")
                      for g in each["groups"] for x in g}  # fmt: skip
            assert {str(x): name for x, name in owners.items()} | {"3": "layers.3"} == each[
                "sae_of_layer"
            ]


def test_means_over_layers_are_plain_means(everything: dict[str, Any]) -> None:
    for each in everything["groupings"]:
        for part, layers in (("all_layers", range(4)), ("grouped_layers", range(3))):
            rows = [row(everything, each["sae_of_layer"][str(x)], x) for x in layers]
            for name, found in each[part].items():
                mean = np.mean([r[name]["value"] for r in rows])
                assert found["value"] == pytest.approx(mean, rel=1e-12)
                assert found["low"] <= found["value"] <= found["high"]


def test_differences_are_those_of_the_means_over_the_grouped_layers(
    everything: dict[str, Any],
) -> None:
    found = by_name(everything)
    assert found["per_layer"]["against_per_layer"] is None
    for name, each in found.items():
        if name != "per_layer":
            check_difference(each, found["per_layer"], each["against_per_layer"])
    compared = {(c["grouping"], c["baseline"]) for c in everything["comparisons"]}
    assert compared
    for each in found.values():  # groups against even groups and smaller SAEs of equal cost
        rivals = {
            other["name"]
            for other in found.values()
            if each["kind"] == "groups"
            and other["num_groups"] == each["num_groups"]
            and other is not each
            and (other["kind"] == "smaller" or "even" in other["rules"])
        }
        assert {b for g, b in compared if g == each["name"]} == rivals
    for each in everything["comparisons"]:
        check_difference(found[each["grouping"]], found[each["baseline"]], each)


def check_difference(
    mine: dict[str, Any], other: dict[str, Any], difference: dict[str, Any]
) -> None:
    for name in COMPARED:
        ours, theirs = mine["grouped_layers"][name], other["grouped_layers"][name]
        off = difference[name]
        assert off["value"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-12)
        assert off["low"] <= off["value"] <= off["high"]


def test_similarity_stands_where_a_layers_own_sae_is_there_too(
    everything: dict[str, Any], folder: Folder
) -> None:
    shared = {
        (name, int(layer))
        for each in everything["groupings"]
        if each["kind"] == "groups"
        for layer, name in each["sae_of_layer"].items()
        if "-" in name
    }
    assert {(r["sae"], r["layer"]) for r in everything["similarity"]} == shared
    suite = load_suite(folder("all"), grouping="per_layer")
    for each in everything["similarity"]:
        assert each["baseline"] == f"layers.{each['layer']}"
        grouping = next(g for g in everything["groupings"] if each["sae"] in g["saes"])
        group = load_suite(folder("all"), grouping=grouping["name"])
        mine, other = (
            torch.nn.functional.normalize(s.saes[n].directions().detach().double(), dim=1)
            for s, n in ((suite, each["baseline"]), (group, each["sae"]))
        )
        assert each["mmcs"] == pytest.approx(float((mine @ other.T).amax(1).mean()), abs=1e-6)
        assert 0 < each["mmco"] < 1
    assert read(folder("ordinary"))["similarity"] == []
    assert read(folder("ordinary"))["comparisons"] == []
    assert by_name(read(folder("ordinary")))["complete-2"]["against_per_layer"] is None


def test_costs_are_relative_to_one_sae_per_layer(
    everything: dict[str, Any], folder: Folder
) -> None:
    found = by_name(everything)
    assert found["per_layer"]["cost"] == {"paper": 1.0, "flops": 1.0, "seconds": 1.0}
    latents = {each["name"]: each["d_sae"] for each in everything["saes"]}
    activations = 24 * 4 * 32**2 + 4 * 4 * 64 * 32  # A and T of the paper, per token
    full = activations + 4 * 10 * 32 * 64
    for each in found.values():
        mine = activations + sum(10 * 32 * latents[name] for name in each["saes"])
        assert each["cost"]["paper"] == pytest.approx(mine / full, rel=1e-12)
        if each["kind"] == "groups":
            assert all(value < 1 for value in each["cost"].values())
    rounding = 3 * 0.5 * 10 * 32 / full  # half a latent on each of three layers
    for count in (1, 2):
        twins = [g for g in found.values() if g["num_groups"] == count and g["kind"] == "groups"]
        assert twins
        for twin in twins:
            off = found[f"smaller-{count}"]["cost"]["paper"] - twin["cost"]["paper"]
            assert abs(off) <= 2 * rounding
    # groups need the distances, evenly spaced ones and smaller SAEs do not
    assert found["complete-2"]["cost"]["flops"] > found["even-2"]["cost"]["flops"]
    ledger = json.loads((folder("all") / "ledger.json").read_text())
    saved = 1 - ledger["saving"]["flops"]
    assert everything["groupings"][0]["cost"]["flops"] == pytest.approx(saved, rel=1e-9)
    assert everything["groupings"][0]["cost"]["seconds"] == pytest.approx(
        1 - ledger["saving"]["seconds"], rel=1e-9
    )


def test_splicing_all_layers_at_once_adds_one_entry_and_changes_nothing_else(
    folder: Folder, tmp_path: Path
) -> None:
    together = read(folder("ordinary"))
    copy = shutil.copytree(folder("ordinary"), tmp_path / "run")
    alone = evaluate(copy, "evaluation.together=false")
    for each in together["groupings"]:
        assert set(each["spliced_together"]) == {"ce", "delta_ce", "delta_ce_percent", "kl"}
        each["spliced_together"] = None
    assert alone["cost"]["planned_flops"] < together["cost"]["planned_flops"]
    for each in (alone, together):
        del each["run"], each["cost"]
    assert alone == together


# ---- the same SAE under two names -------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(tiny_lm: Path) -> dict[str, Any]:
    """Return an evaluation in which a group's SAE is the very SAE of the layer."""
    lm = frozen(tiny_lm)
    model = lm.load_with_head(torch.device("cpu"))
    tokens = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(1))
    sae = TopK(d_model=32, expansion=2, k=4, generator=torch.Generator().manual_seed(0))
    worse = TopK(d_model=32, expansion=1, k=1, generator=torch.Generator().manual_seed(0))

    def alone(name: str, layers: list[int], which: TopK) -> Suite:
        factors = {str(layer): 1.0 for layer in layers}
        return Suite({name: which}, {name: {"layers": layers, "norm_factors": factors}})

    saes = {
        "zero": alone("zero", [0], sae),
        "one": alone("one", [1], sae),
        "both": alone("both", [0, 1], sae),
        "again": alone("again", [0, 1], sae),
        "worse": alone("worse", [0, 1], worse),
    }
    distances = np.array([[0.0, 0.1], [0.1, 0.0]])
    pair, single = ([[0, 1]], [[0], [1]])

    def way(name: str, kind: Any, rule: str, groups: list[list[int]], owner: Any) -> Grouping:
        part = build_partition(distances, groups, rule)
        return Grouping(name, kind, len(groups), part, owner, [0, 1], [rule])

    ways = [
        way("both", "groups", "complete", pair, {0: "both", 1: "both"}),
        way("worse", "groups", "minmax", pair, {0: "worse", 1: "worse"}),
        way("again", "groups", "even", pair, {0: "again", 1: "again"}),
        way("per_layer", "per_layer", "complete", single, {0: "zero", 1: "one"}),
    ]
    sums = HeldoutSums(saes, ways, False, 100_000)
    everything = TokenFilter(None, 0, None)
    run_heldout(sums, iter(tokens.split(4)), model, torch.zeros(4, 32), everything, lambda _: None)
    return Results(sums, Bootstrap(np.arange(8), 200, 0.95, 0)).to_json({})


NOTHING = {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_difference_of_an_sae_with_itself_is_exactly_nothing(twins: dict[str, Any]) -> None:
    both = by_name(twins)["both"]
    assert both["against_per_layer"] == dict.fromkeys(COMPARED, NOTHING)
    same = next(
        c for c in twins["comparisons"] if (c["grouping"], c["baseline"]) == ("both", "again")
    )
    assert {name: same[name] for name in COMPARED} == dict.fromkeys(COMPARED, NOTHING)


def test_a_difference_is_positive_where_the_grouping_is_worse(twins: dict[str, Any]) -> None:
    worse = by_name(twins)["worse"]["against_per_layer"]
    assert worse["fvu"]["low"] > 0
    against = next(c for c in twins["comparisons"] if c["grouping"] == "worse")
    assert {n: against[n] for n in COMPARED} == worse  # the even groups are the per-layer SAEs


def test_an_sae_is_found_again_in_itself(twins: dict[str, Any]) -> None:
    for each in twins["similarity"]:
        if each["sae"] in ("both", "again"):
            assert each["mmcs"] == pytest.approx(1, abs=1e-6)
            assert each["mmco"] == 1
        else:
            assert each["mmco"] < 1
    assert {(r["sae"], r["layer"]) for r in twins["similarity"]} == {
        (name, layer) for name in ("both", "again", "worse") for layer in (0, 1)
    }


# ---- one SAE ----------------------------------------------------------------------------------


def test_a_groups_figures_are_the_means_over_its_layers(everything: dict[str, Any]) -> None:
    for sae in everything["saes"]:
        mine = [row(everything, sae["name"], layer) for layer in sae["layers"]]
        for metric, found in mine[0].items():
            if metric in ("sae", "layer", "dead", "dense"):
                continue
            if isinstance(found, dict):
                mean = np.mean([each[metric]["value"] for each in mine])
                assert sae[metric]["value"] == pytest.approx(mean, rel=1e-12)
                assert sae[metric]["low"] < mean < sae[metric]["high"] or metric == "l0"
            else:
                mean = np.mean([each[metric] for each in mine])
                assert sae[metric] == pytest.approx(mean, rel=1e-12)
            if len(mine) == 1:
                assert sae[metric] == found


# ---- files ------------------------------------------------------------------------------------


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize("kind", ["ordinary", "all", "special"])
def test_tables_hold_what_the_json_says(kind: str, folder: Folder) -> None:
    evaluation, place = read(folder(kind)), folder(kind) / "evaluation"
    rows = table(place / "results.csv")
    assert len(rows) == len(evaluation["results"])
    for line, each in zip(rows, evaluation["results"], strict=True):
        assert line["sae"] == each["sae"]
        for name, value in each.items():
            if isinstance(value, dict):
                ends = [line[name], line[f"{name}_low"], line[f"{name}_high"]]
                assert [float(x) for x in ends] == [value[k] for k in ("value", "low", "high")]
            elif name != "sae":
                assert float(line[name]) == value
    rows = table(place / "saes.csv")
    for line, each in zip(rows, evaluation["saes"], strict=True):
        assert line["name"] == each["name"]
        assert [int(x) for x in line["layers"].split()] == each["layers"]
        for metric in AVERAGED:
            ends = [line[metric], line[f"{metric}_low"], line[f"{metric}_high"]]
            assert [float(x) for x in ends] == list(each[metric].values())
        assert float(line["dead"]) == each["dead"]
        assert float(line["specific"]) == each["profile"]["specific"]
    rows = table(place / "layers.csv")
    for line, each in zip(rows, evaluation["layers"], strict=True):
        assert int(line["layer"]) == each["layer"]
        assert float(line["ce_zero"]) == each["ce_zero"]["value"]
        assert float(line["ce_mean_low"]) == each["ce_mean"]["low"]
        assert float(line["ce_clean"]) == evaluation["ce"]["value"]
    rows = table(place / "groupings.csv")
    for line, each in zip(rows, evaluation["groupings"], strict=True):
        assert line["name"] == each["name"]
        assert int(line["num_groups"]) == each["num_groups"]
        assert float(line["cost_paper"]) == each["cost"]["paper"]
        assert float(line["fvu"]) == each["grouped_layers"]["fvu"]["value"]
        if each["spliced_together"]:
            assert float(line["together_kl"]) == each["spliced_together"]["kl"]["value"]
        else:
            assert kind == "all"
        if each["against_per_layer"]:
            assert float(line["against_kl_high"]) == each["against_per_layer"]["kl"]["high"]
        elif kind == "all":
            assert line["against_kl_high"] == ""


def test_the_sums_per_sequence_are_enough_to_recompute_the_intervals(folder: Folder) -> None:
    evaluation = read(folder("all"))
    options = evaluation["bootstrap"]
    with np.load(folder("all") / "evaluation" / "sequences.npz") as stored:
        sums = dict(stored)
    n = len(sums["predictions"])
    assert n == evaluation["sequences"]
    documents = len(set(sums["document"]))
    assert documents == evaluation["documents"]
    draws = np.random.default_rng(options["seed"]).multinomial(
        documents, np.full(documents, 1 / documents), size=options["resamples"]
    )
    weights = draws[:, sums["document"]]
    tail = (1 - options["level"]) / 2

    def fvu(w: np.ndarray, sae: str, layer: int) -> float:
        total = w @ sums[f"sum_x/{layer}"]
        variance = w @ sums[f"sum_squares/{layer}"] - total @ total / (w @ sums[f"count/{layer}"])
        return float(w @ sums[f"squared_error/{sae}/{layer}"] / variance)

    def delta_ce(w: np.ndarray, sae: str, layer: int) -> float:
        more = sums[f"ce/{sae}/{layer}"] - sums["clean_ce"]
        return float(w @ more / (w @ sums["predictions"]))

    for each in evaluation["results"]:
        pair = each["sae"], each["layer"]
        for name, figure in (("fvu", fvu), ("delta_ce", delta_ce)):
            low, high = np.quantile([figure(w, *pair) for w in weights], [tail, 1 - tail])
            wanted = {"value": figure(np.ones(n), *pair), "low": low, "high": high}
            assert each[name] == pytest.approx(wanted, abs=1e-9)
    # paired: both sides of a difference on the same resample
    found = by_name(evaluation)
    mine, other = found["complete-1"]["sae_of_layer"], found["per_layer"]["sae_of_layer"]
    layers = ("0", "1", "2")

    def lost(w: np.ndarray) -> float:
        return float(
            np.mean([fvu(w, mine[x], int(x)) for x in layers])
            - np.mean([fvu(w, other[x], int(x)) for x in layers])
        )

    low, high = np.quantile([lost(w) for w in weights], [tail, 1 - tail])
    wanted = {"value": lost(np.ones(n)), "low": low, "high": high}
    assert found["complete-1"]["against_per_layer"]["fvu"] == pytest.approx(wanted, abs=1e-9)


def test_firings_are_stored_for_every_sae_and_layer(
    everything: dict[str, Any], folder: Folder
) -> None:
    place = folder("all") / "evaluation" / "latents"
    names = {each["name"] for each in everything["saes"]}
    assert {file.stem for file in place.glob("*.npz")} == names
    for each in everything["saes"]:
        with np.load(place / f"{each['name']}.npz") as stored:
            fired, layers, tokens = stored["fired"], stored["layers"], stored["tokens"]
        assert fired.dtype == np.int64
        assert fired.shape == (len(layers), each["d_sae"])
        assert layers.tolist() == each["layers"]
        assert tokens.tolist() == [everything["tokens"]] * len(layers)
        for counts, layer in zip(fired, layers, strict=True):
            found = row(everything, each["name"], int(layer))
            assert counts.sum() == pytest.approx(found["l0"]["value"] * everything["tokens"])
            assert (counts == 0).mean() == pytest.approx(found["dead"])
            assert (counts > 0.1 * everything["tokens"]).mean() == pytest.approx(found["dense"])
        never = int((fired.sum(0) == 0).sum())
        assert each["dead"] == pytest.approx(never / each["d_sae"])
        assert each["density_histogram"]["never"] == each["profile"]["never"] == never
        assert sum(each["density_histogram"]["counts"]) == each["d_sae"] - never
