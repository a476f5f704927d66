"""The pass over held-out text, against the plain model and against what must come out exactly."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from groupsae.data.filters import TokenFilter
from groupsae.evaluation.heldout import HeldoutSums, run_heldout
from groupsae.evaluation.intervals import Bootstrap
from groupsae.evaluation.results import Results
from groupsae.grouping.groupings import Grouping
from groupsae.sae.base import SparseLatents
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite
from tests.helpers.evaluated import evaluate, evaluated, read, reference, set_option
from tests.helpers.lms import frozen

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return lambda kind: evaluated(kind, tiny_lm, tiny_text, tmp_path_factory.getbasetemp())


def pairs(
    evaluation: dict[str, Any], wanted: dict[Any, dict[str, float]]
) -> dict[Any, tuple[float, float]]:
    """Return what was found and what was wanted, of every figure of the reference."""
    both = {("clean", "ce"): (evaluation["ce"]["value"], wanted["clean"]["ce"])}
    for row in evaluation["layers"]:
        for name in ("ce_zero", "ce_mean"):
            both[row["layer"], name] = row[name]["value"], wanted[row["layer"]][name]
    for row in evaluation["results"]:
        for name, value in wanted[row["sae"], row["layer"]].items():
            found = row[name]["value"] if isinstance(row[name], dict) else row[name]
            both[(row["sae"], row["layer"]), name] = found, value
    for each in evaluation["groupings"]:
        assert (each["spliced_together"] is None) == (each["name"] not in wanted)
        for name, value in wanted.get(each["name"], {}).items():
            both[each["name"], name] = each["spliced_together"][name]["value"], value
    return both


@pytest.mark.parametrize("kind", ["ordinary", "all", "special", "filtered"])
def test_the_pass_agrees_with_the_plain_model_one_sequence_at_a_time(
    kind: str, folder: Folder
) -> None:
    evaluation = read(folder(kind))
    wanted = reference(folder(kind), exclude=kind == "special")
    assert evaluation["exclude_special_tokens"] is (kind == "special")
    assert evaluation["predictions"] == wanted["clean"]["predictions"]
    assert evaluation["tokens"] == wanted["clean"]["tokens"]
    served = {(row["sae"], row["layer"]) for row in evaluation["results"]}
    assert served == {key for key in wanted if isinstance(key, tuple)}
    for (key, name), (found, value) in pairs(evaluation, wanted).items():
        # a score is a quotient of differences: what these are off by, over the denominator
        scale = 1e-6 * max(1.0, abs(value))
        if name in ("ce_score", "ce_score_mean"):
            layer = wanted[key[1]]
            ablated = layer["ce_zero" if name == "ce_score" else "ce_mean"]
            scale /= min(1.0, abs(ablated - wanted["clean"]["ce"]))
        if name == "kl_score":
            scale /= min(1.0, wanted[key[1]]["kl_zero"])
        assert found == pytest.approx(value, abs=scale, rel=0), (key, name)


def test_special_tokens_are_left_out_on_purpose_and_counted_on_purpose(
    folder: Folder, tmp_path: Path
) -> None:
    without = read(folder("special"))
    copy = shutil.copytree(folder("special"), tmp_path / "run")
    counted = evaluate(copy, "evaluation.exclude_special_tokens=false")
    sequences, context = without["sequences"], without["context"]
    assert counted["tokens"] == sequences * context
    assert counted["predictions"] == sequences * (context - 1)
    # every block starts with BOS; some have an EOS between documents as well
    assert without["tokens"] <= sequences * (context - 1)
    assert without["predictions"] <= sequences * (context - 2)
    assert counted["ce"]["value"] != without["ce"]["value"]
    for before, after in zip(without["results"], counted["results"], strict=True):
        assert before["fvu"]["value"] != after["fvu"]["value"]


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Return every leaf of nested lists and dicts by its path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {at: value}
    return {k: v for key, item in items for k, v in leaves(item, f"{at}/{key}").items()}


def test_the_split_into_batches_changes_nothing_but_the_legacy_variant(
    folder: Folder, tmp_path: Path
) -> None:
    first = read(folder("ordinary"))
    copy = shutil.copytree(folder("ordinary"), tmp_path / "run")
    set_option(copy, "stream.blocks_per_forward", 3)  # steps of 8 come as 3, 3 and 2
    again = evaluate(copy, "evaluation.together=true")
    before, after = leaves(first), leaves(again)
    assert before.keys() == after.keys()
    differ = set()
    for key, value in before.items():
        if isinstance(value, float) and not key.startswith("/cost"):
            if after[key] != pytest.approx(value, rel=1e-5, abs=1e-6):
                legacy = "/explained_variance_legacy/" in key
                differ.add("explained_variance_legacy" if legacy else key)
        elif not key.startswith(("/cost", "/run")):
            assert after[key] == value, key
    assert differ == {"explained_variance_legacy"}
    assert again["cost"]["planned_flops"] == first["cost"]["planned_flops"]
    assert again["cost"]["measured_flops"] == first["cost"]["measured_flops"]


def test_the_flops_counted_are_the_flops_planned(folder: Folder) -> None:
    # with all layers spliced at once, and without, and from another hookpoint
    for kind in ("ordinary", "all", "filtered"):
        cost = read(folder(kind))["cost"]
        assert cost["measured_flops"] == cost["planned_flops"]


# ---- exact cases, with SAEs that are not trained ----------------------------------------------


class Stub(Suite):
    """An SAE that gives back what it was given, times a number."""

    factor = 1.0

    def encode_sparse(self, acts: Tensor, layer: int) -> SparseLatents:
        self.seen = acts
        return super().encode_sparse(acts, layer)

    def decode_sparse(self, latents: SparseLatents, layer: int) -> Tensor:
        return self.seen * self.factor


class Zeros(Stub):
    factor = 0.0


def stub(kind: type[Suite], name: str, layers: list[int]) -> Suite:
    sae = TopK(d_model=32, expansion=2, k=4, generator=torch.Generator().manual_seed(0))
    config = {"layers": layers, "norm_factors": {str(layer): 1.0 for layer in layers}}
    return kind({name: sae}, {name: config})


SPECIAL = {
    None: TokenFilter(None, 0, None),
    "excluded": TokenFilter(torch.arange(40), 0, None),
    "first": TokenFilter(None, 3, None),
    "extreme": TokenFilter(None, 0, 1.1),
}


@pytest.fixture(scope="module", params=SPECIAL)
def results(request: pytest.FixtureRequest, tiny_lm: Path) -> Results:
    """Return an evaluation of perfect and of useless SAEs on random tokens."""
    lm = frozen(tiny_lm)
    model = lm.load_with_head(torch.device("cpu"))
    tokens = torch.randint(0, 512, (6, 64), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0  # every block starts with a special token
    saes = {
        "perfect": stub(Stub, "perfect", [0, 1, 2, 3]),
        "zeros": stub(Zeros, "zeros", [0, 1, 2, 3]),
    }
    ways = [
        Grouping(name, "groups", 1, None, dict.fromkeys(range(4), name), [0, 1, 2])
        for name in saes
    ]
    sums = HeldoutSums(saes, ways, True, 0)
    means = torch.randn(4, 32)
    run_heldout(sums, iter(tokens.split(4)), model, means, SPECIAL[request.param], lambda _: None)
    return Results(sums, Bootstrap(np.arange(6), 50, 0.9, 0))


def test_a_perfect_reconstruction_costs_exactly_nothing(results: Results) -> None:
    for layer in range(4):
        sums = results.sums.pairs["perfect", layer]
        assert np.array_equal(sums.effect["ce"], results.sums.clean["ce"])
        assert not sums.effect["kl"].any()
        found = results.estimates["perfect", layer]
        for name in ("fvu", "delta_ce", "delta_ce_percent", "kl"):
            assert len(found[name]) == 1 + 50  # the value, then each resample
            assert not found[name].any()
        for name in ("ce_score", "ce_score_mean", "kl_score"):
            assert found[name][0] == 1
    together = results.sums.together["perfect"]
    assert np.array_equal(together["ce"], results.sums.clean["ce"])
    assert not together["kl"].any()


def test_zeros_are_zero_ablation_exactly(results: Results) -> None:
    for layer, ablated in results.sums.layers.items():
        sums = results.sums.pairs["zeros", layer]
        assert np.array_equal(sums.effect["ce"], ablated.zero["ce"])
        assert np.array_equal(sums.effect["kl"], ablated.zero["kl"])
        assert (ablated.zero["kl"] > 0).all()
        found = results.estimates["zeros", layer]
        assert found["ce_score"][0] == 0
        assert found["kl_score"][0] == 0


def test_positions_that_are_left_out_keep_their_own_activation(tiny_lm: Path) -> None:
    """If all but the last position are special, nothing that is predicted can change."""
    lm = frozen(tiny_lm)
    hooked = lm.load_with_head(torch.device("cpu"))
    tokens = torch.randint(0, 100, (4, 64), generator=torch.Generator().manual_seed(1))
    tokens[:, -2] = 200  # one position counts, and the one after it is only predicted
    saes = {"zeros": stub(Zeros, "zeros", [0, 1, 2, 3])}
    ways = [Grouping("z", "groups", 1, None, dict.fromkeys(range(4), "zeros"), [0, 1])]
    sums = HeldoutSums(saes, ways, True, 0)
    special = TokenFilter(torch.arange(100), 0, None)
    run_heldout(sums, iter([tokens]), hooked, torch.zeros(4, 32), special, lambda _: None)
    model, blocks = hooked.model, hooked.blocks
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.double()
    ce = -logits[:, -2].log_softmax(-1).gather(1, tokens[:, -1:])[:, 0]
    assert sums.clean["predictions"].tolist() == [1] * 4
    assert sums.clean["ce"] == pytest.approx(ce.numpy(), abs=1e-6)
    # at the last layer only the one position is zero: attention reads nothing after it
    last = model.gpt_neox.final_layer_norm(torch.zeros(1, 32))
    zeroed = -(model.get_output_embeddings()(last).double().log_softmax(-1))[0, tokens[:, -1]]
    assert sums.layers[3].zero["ce"] == pytest.approx(zeroed.detach().numpy(), abs=1e-6)
    assert sums.pairs["zeros", 3].reconstruction["count"].tolist() == [1] * 4
    # lower down, the other positions still hold what attention looks for
    handle = blocks[1].register_forward_hook(lambda _m, _a, out: last_to_zero(out))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.double()
    handle.remove()
    ce = -logits[:, -2].log_softmax(-1).gather(1, tokens[:, -1:])[:, 0]
    assert sums.layers[1].zero["ce"] == pytest.approx(ce.numpy(), abs=1e-6)


def last_to_zero(output: Any) -> Any:
    residual = (output if isinstance(output, Tensor) else output[0]).clone()
    residual[:, -2] = 0
    return residual if isinstance(output, Tensor) else (residual, *output[1:])
