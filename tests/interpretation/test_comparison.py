"""The tables over groupings: means and differences against plain loops, labels by brute force."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from groupsae.grouping.groupings import Grouping
from groupsae.interpretation.comparison import (
    groupings_frame,
    latents_frame,
    transfer_frame,
)
from groupsae.interpretation.explain import RESAMPLES
from groupsae.interpretation.sharing import KINDS, kind_of_latent, labels_needed, transfer

GROUPED = [0, 1, 2]
OWN = {layer: f"own.{layer}" for layer in GROUPED}


def made_up(name: str, layers: list[int], draws: np.random.Generator, latents=range(0, 40, 2)):
    """Return an SAE as explanations.json has it, with drawn scores; some layers are left out."""
    rows = []
    for latent in latents:
        held = [x for x in layers if len(layers) == 1 or draws.random() > 0.2]
        places = [*map(str, held), "all"]
        f1 = {a: {b: draws.random() for b in places} for a in places}
        if len(layers) == 1:
            f1 = dict.fromkeys(places, dict.fromkeys(places, draws.random()))
        null = {b: 0.1 * draws.random() for b in places}

        def entry(b, f1=f1, null=null):
            scores = {"f1": f1[b][b], "null_f1": null[b], "unigram_auprc": draws.random()}
            adjusted = (f1[b][b] - null[b]) / (1 - null[b])
            return {"text": f"`{b}`", "scores": {**scores, "adjusted_f1": adjusted}}

        kinds = draws.choice(["same", "narrower", "unclear"], len(held) * (len(held) - 1) // 2)
        rows.append(
            {
                "latent": latent,
                "layers": {b: entry(b) for b in places[:-1]},
                "all": entry("all"),
                "transfer": f1,
                "sharing": {
                    "rates": [0.01] * len(layers),
                    "pairs": [{"kind": str(kind)} for kind in kinds],
                },
            }
        )
    return {"name": name, "layers": layers, "drawn": 25, "rare": 5, "latents": rows}


@pytest.fixture(scope="module")
def explained():
    draws = np.random.default_rng(0)
    found = {"shared": made_up("shared", [0, 1], draws)}
    found |= {name: made_up(name, [x], draws, range(30)) for x, name in OWN.items()}
    return json.loads(json.dumps(found))  # as it is read from the file


@pytest.fixture(scope="module")
def found():
    two = {0: "shared", 1: "shared", 2: OWN[2]}
    return [
        Grouping("complete-2", "groups", 2, None, two, GROUPED, ["complete", "even"]),
        Grouping("per_layer", "per_layer", 3, None, OWN, GROUPED),
        Grouping("complete-1", "groups", 1, None, dict.fromkeys(GROUPED, "absent"), GROUPED),
    ]


@pytest.fixture(scope="module")
def directions():
    draws = torch.Generator().manual_seed(0)
    return {n: torch.randn(60, 5, generator=draws) for n in ("shared", *OWN.values())}


@pytest.fixture(scope="module")
def latents(explained, found, directions):
    return latents_frame(explained, found, directions)


@pytest.fixture(scope="module")
def frame(explained, found, latents):
    return groupings_frame(explained, found, latents).set_index("grouping")


def test_intervals_of_f1_draw_documents_as_well(explained, found, latents, frame):
    draws, resampled = np.random.default_rng(1), {}
    wide = draws.normal(0, 0.2, RESAMPLES)  # what another sample of documents does to every F1
    for name, sae in explained.items():
        each = np.full((len(sae["latents"]), len(sae["layers"]), 2, RESAMPLES), np.nan)
        for i, row in enumerate(sae["latents"]):
            for layer in row["layers"]:
                own = (row["transfer"][a][layer] for a in (layer, "all"))
                each[i, sae["layers"].index(int(layer))] = [f1 + wide for f1 in own]
        resampled[name] = each
    wider = groupings_frame(explained, found, latents, 0, resampled).set_index("grouping")
    spread, known = ((f["f1_high"] - f["f1_low"])["complete-2"] for f in (wider, frame))
    assert spread > 3.9 * 0.18  # 95 % of a normal distribution of this width, at least
    assert spread > 2 * known
    pairs = ("f1_difference", "one_label_f1_difference", "label_cost")  # documents cancel out
    for metric in pairs:
        for end in ("", "_low", "_high"):
            name = f"{metric}{end}"
            assert wider[name]["complete-2"] == pytest.approx(frame[name]["complete-2"], abs=1e-3)


def test_a_judges_scores_are_in_the_table(explained, found, latents):
    draws, judged = np.random.default_rng(2), {}
    for name, sae in explained.items():
        rows = sae["latents"][::2]
        judged[name] = {"latents": [
            {"latent": r["latent"], "judge": {t: {"own": {"f1": draws.random()}}
                                              for t in ("detection", "fuzzing")}}
            for r in rows
        ]}  # fmt: skip
    run = {"judge": {"name": "some-llm"}, "saes": judged}
    frame = groupings_frame(explained, found, latents, judged=run).set_index("grouping")
    assert (frame["judge"] == "some-llm").all()
    known = {name: set(latents["latent"][latents["sae"] == name]) for name in explained}
    means = {
        name: np.mean([
            r["judge"]["fuzzing"]["own"]["f1"]
            for r in sae["latents"]
            if r["latent"] in known[name]
        ])
        for name, sae in judged.items()
    }  # fmt: skip
    own = [means[OWN[layer]] for layer in GROUPED]
    shared = (2 * means["shared"] + own[2]) / 3
    assert frame["fuzzing_f1"]["per_layer"] == pytest.approx(np.mean(own))
    assert frame["fuzzing_f1"]["complete-2"] == pytest.approx(shared)
    assert frame["fuzzing_f1_difference"]["complete-2"] == pytest.approx(shared - np.mean(own))
    assert frame["detection_f1_low"].notna().all()


def values(explained, name, key):
    """Return a score of every explained latent of an SAE at each layer where it has one."""
    return [
        entry["scores"][key]
        for row in explained[name]["latents"]
        for entry in row["layers"].values()
    ]


@pytest.mark.parametrize("key", ["f1", "adjusted_f1"])
def test_means_are_over_layers_and_latents(explained, frame, key):
    own = {x: np.mean(values(explained, name, key)) for x, name in OWN.items()}
    shared = np.mean(values(explained, "shared", key))
    assert frame[key]["per_layer"] == pytest.approx(np.mean(list(own.values())))
    assert frame[key]["complete-2"] == pytest.approx((2 * shared + own[2]) / 3)
    # a layer that both groupings give the same SAE differs by nothing
    difference = frame[f"{key}_difference"]
    assert difference["complete-2"] == pytest.approx((2 * shared - own[0] - own[1]) / 3)
    assert np.isnan(difference["per_layer"])
    assert "complete-1" not in frame.index  # its SAE was not explained


def test_intervals_hold_their_value_and_differences_are_paired(explained, frame, found, latents):
    for metric in ("f1", "one_label_f1", "f1_difference", "labels", "tau_1"):
        value, low, high = (frame[f"{metric}{end}"]["complete-2"] for end in ("", "_low", "_high"))
        assert low < value < high
        if "f1" in metric:  # about 4 standard errors of uniform scores of 20 latents
            assert 0.05 < high - low < 0.4
    twin = Grouping("twin", "groups", 3, None, OWN, GROUPED)  # the same SAEs as one per layer
    row = groupings_frame(explained, [found[1], twin], latents).set_index("grouping").loc["twin"]
    ends = [row[f"f1_difference{end}"] for end in ("", "_low", "_high")]
    assert ends == [0, 0, 0]


def test_kinds_are_shares_of_the_shared_latents(explained, frame):
    rows = explained["shared"]["latents"]
    rows = [row for row in rows if row["layers"]]
    kinds = [kind_of_latent([p["kind"] for p in row["sharing"]["pairs"]]) for row in rows]
    for kind in KINDS:
        assert frame[kind]["complete-2"] == pytest.approx(np.mean([k == kind for k in kinds]))
    assert frame[list(KINDS)].loc["complete-2"].sum() == pytest.approx(1)
    assert frame["labels"].isna()["per_layer"]


def test_a_match_is_the_latent_with_the_most_similar_direction(
    explained, found, directions, latents, frame
):
    ours = latents[latents["sae"] == "shared"]
    f1 = {(r.sae, r.latent): r.f1 for r in latents.itertuples()}
    gaps = []
    for row in ours.itertuples():
        direction = directions["shared"][row.latent]
        cosines = F.cosine_similarity(directions[OWN[row.layer]], direction[None], dim=1)
        assert row.match == int(cosines.argmax())
        assert row.cosine == pytest.approx(float(cosines.max()), abs=1e-6)
        if row.match < 30:  # it was explained
            gaps.append(row.f1 - f1[OWN[row.layer], row.match])
    assert frame["matched"]["complete-2"] == len(gaps) > 3
    assert frame["matched_difference"]["complete-2"] == pytest.approx(np.mean(gaps))
    assert np.isfinite(frame["random_difference"]["complete-2"])
    assert (
        latents_frame(explained, found[:1], directions)["match"].isna().all()
    )  # without one SAE per layer


def test_transfer_is_a_mean_over_the_latents_where_it_is_defined(explained):
    frame = transfer_frame(explained)
    assert set(frame["sae"]) == {"shared"}
    rows = explained["shared"]["latents"]
    for cell in frame.itertuples():
        taus = [transfer(row, [cell.layer], [cell.made_at])[0, 0] for row in rows]
        held = [tau for tau in taus if not np.isnan(tau)]
        assert (cell.latents, cell.tau) == (len(held), pytest.approx(np.mean(held)))
    own = frame[frame["made_at"] == frame["layer"]]
    assert own["tau"].tolist() == pytest.approx([1, 1])


def row_with(tau):
    """Return a latent whose explanation made at i (last: at all) has F1 tau[i][j] at layer j."""
    places = [*map(str, range(len(tau[0]))), "all"]
    f1 = {a: dict(zip(places, map(float, scores), strict=False)) for a, scores in
          zip(places, tau, strict=True)}  # fmt: skip
    layers = {b: {"scores": {"null_f1": 0.0, "f1": f1[b][b]}} for b in places[:-1]}
    return {"layers": layers, "transfer": f1}


def test_labels_needed_is_the_size_of_the_smallest_cover():
    draws = np.random.default_rng(0)
    counts = []
    for _ in range(60):
        n = int(draws.integers(1, 6))
        tau = (draws.random((n + 1, n)) > 0.6) * 0.9
        tau[range(n), range(n)] = 1.0
        sizes = [
            size
            for size in range(1, n + 1)
            for chosen in combinations(range(n + 1), size)
            if (tau[list(chosen)] >= 0.8).any(0).all()
        ]
        counts.append(labels_needed(row_with(tau), range(n)))
        assert counts[-1] == min(sizes)
    assert set(counts) >= {1, 2, 3}
    # nothing to explain: no layer's own explanation is above its null
    assert labels_needed(row_with(np.full((3, 2), 0.05)), range(2)) is None
    # a layer that is not explained itself needs no label
    assert labels_needed(row_with([[0.9, 0.0], [0.0, 0.05], [0.0, 0.0]]), range(2)) == 1


def test_many_layers_that_each_need_their_own_label_are_counted_at_once():
    assert labels_needed(row_with(np.vstack([np.eye(40), np.zeros(40)])), range(40)) == 40
