"""Circuits: effects against finite differences, circuits against plain forwards, areas, tasks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.pretraining.model import build_gpt_neox
from groupsae.evaluation.circuits.areas import areas
from groupsae.evaluation.circuits.attribution import METHODS, attribute, gradients
from groupsae.evaluation.circuits.examples import Batch, batches
from groupsae.evaluation.circuits.part import Circuits
from groupsae.evaluation.circuits.running import (
    Circuit,
    Order,
    patched,
    run_circuit,
    without,
)
from groupsae.evaluation.circuits.tasks import Pair, check_tasks, make_task, shipped
from groupsae.evaluation.given import alone
from groupsae.evaluation.parts import Subject
from groupsae.reporting.downstream import DOWNSTREAM_TABLES, circuit_latents_table
from groupsae.reporting.figures import circuit_curves
from groupsae.reporting.load import RunFiles
from groupsae.runtime.errors import UserError
from groupsae.sae.relu import ReLU
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite
from tests.helpers.lms import hooked
from tests.helpers.saes import FAMILY, trained

CPU = torch.device("cpu")
FACTORS = {"0": 0.5, "1": 0.25, "2": 2.0}


def subject_of(suite: Suite, lm: Any) -> Subject:
    saes, grouping = alone(suite)
    return Subject(
        saes=saes, groupings=[grouping], lm=lm, tokenizer=lambda: None
    )  # type: ignore[arg-type]  # fmt: skip


def suite_of(sae: Any, layers: tuple[int, ...] = (0, 1, 2), factors: Any = FACTORS) -> Suite:
    factors = {str(layer): factors[str(layer)] for layer in layers}
    config = {"layers": list(layers), "norm_factors": factors}
    return Suite({"all": sae}, {"all": config}).to(torch.float64)


def identity(width: int) -> ReLU:
    """Return an SAE that gives back what it gets: relu(x) - relu(-x)."""
    sae = ReLU(d_model=width, d_sae=2 * width, l1_coefficient=0.1)
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
    return sae


@pytest.fixture(scope="module")
def lm() -> Any:
    torch.manual_seed(0)
    model = build_gpt_neox(num_layers=3, d_model=16, num_heads=2, vocab_size=64, context=16)
    with torch.no_grad():
        for parameter in model.gpt_neox.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return hooked(model.double().eval().requires_grad_(False), 3, d_model=16)


@pytest.fixture(scope="module")
def suite() -> Suite:
    made = TopK(d_model=16, d_sae=64, k=4, generator=torch.Generator().manual_seed(1))
    return suite_of(made)


def pairs(count: int = 3) -> list[Pair]:
    drawn = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        first = torch.randint(0, 64, (5 + i % 2,), generator=drawn).tolist()
        second = [*first[:2], (first[2] + 7) % 64, *first[3:-1], (first[-1] + 1) % 64]
        found.append(Pair((tuple(first), tuple(second)), ((3,), (9,))))
    return found


def one_batch() -> Batch:
    return next(batches(pairs(1), 8, CPU))


def test_effects_are_finite_differences_of_latents_and_add_up_with_the_error(
    lm: Any, suite: Suite
) -> None:
    batch = Batch(*(x[:1] for x in one_batch()[:4]), False)
    clean, patch = (lm.acts(x, [0, 1, 2]) for x in (batch.clean, batch.patch))
    grads = gradients(lm, batch, clean, patch, "attribution", 1)
    found = attribute(lm, [batch], suite, "attribution", 1, lambda *_: None)
    for sae in suite:
        layer, effects = sae.layer, found["all", sae.layer]
        f_clean, f_patch = sae.encode(clean[layer])[0], sae.encode(patch[layer])[0]
        expected = torch.zeros(64, dtype=torch.float64)
        for pos, latent in (f_patch != f_clean).nonzero().tolist():

            def moved(
                tokens: Tensor, step: float, pos: int = pos, latent: int = latent, sae: Any = sae
            ) -> Tensor:
                def visit(_: int, acts: Tensor) -> Tensor:
                    acts = acts.clone()
                    acts[0, pos] += step * sae.direction(latent)
                    return acts

                run = lm.run(lm.inputs(tokens), [sae.layer], visit, stop=False)
                return batch.metric(run.logits)[0]

            # the mean of both runs, as each is the clean one of one direction of the pair
            slopes = [
                (moved(x, 1e-5) - moved(x, -1e-5)) / 2e-5 for x in (batch.clean, batch.patch)
            ]
            expected[latent] += sum(slopes) / 2 * (f_patch - f_clean)[pos, latent]
        torch.testing.assert_close(effects.sums, expected, rtol=1e-6, atol=1e-9)
        errors = [x[layer] - sae(x[layer]) for x in (patch, clean)]
        of_error = (grads[layer] * (errors[0] - errors[1])).sum()
        total = (grads[layer] * (patch[layer] - clean[layer])).sum()
        torch.testing.assert_close(effects.sums.sum() + of_error, total)


def test_one_direction_of_a_pair_has_the_effects_of_both(lm: Any, suite: Suite) -> None:
    for method in METHODS:
        one, both = (
            attribute(lm, batches(pairs(), 8, CPU, sides), suite, method, 4, lambda *_: None)
            for sides in (1, 2)
        )
        for key, effects in one.items():
            torch.testing.assert_close(2 * effects.sums, both[key].sums)


class _Through:
    """Splices SAEs in and lets gradients pass through them; keeps what enters the first one."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.entered = suite, torch.zeros(0)

    def __call__(self, layer: int, acts: Tensor) -> Tensor:
        if layer == 0:
            self.entered = acts = acts.detach().requires_grad_()
        x_hat = self.suite[layer](acts)
        return x_hat + (acts - x_hat).detach()


@pytest.mark.parametrize("kind", FAMILY)
def test_gradients_of_the_plain_model_are_those_with_saes_and_their_errors_in_it(
    lm: Any, kind: str
) -> None:
    suite, batch = suite_of(trained(kind, d_model=16)), one_batch()
    clean = lm.acts(batch.clean, [0, 1, 2])
    plain = gradients(lm, batch._replace(patch=batch.clean), clean, clean, "attribution", 1)
    leaves: dict[int, list[Tensor]] = {}

    def visit(layer: int, acts: Tensor) -> Tensor:
        f = suite[layer].encode(acts).detach()
        error = (acts - suite[layer].decode(f)).detach()
        leaves[layer] = [f.requires_grad_(), error.requires_grad_()]
        # f and the error are leaves: what is below them gets the identity
        return suite[layer].decode(f) + error + acts - acts.detach()

    logits = lm.run(lm.inputs(batch.clean), clean, visit, stop=False, grad=True).logits
    found = torch.autograd.grad(batch.metric(logits).sum(), sum(leaves.values(), []))
    for layer, of_latents, of_error in zip(leaves, found[::2], found[1::2], strict=True):
        torch.testing.assert_close(of_error, plain[layer])
        decoder = suite[layer].W_dec / suite[layer].norm_factor
        torch.testing.assert_close(of_latents, of_error @ decoder.T)
        assert of_latents.abs().max() > 0
    # as the reference code has it, through the SAEs of the layers above
    logits = lm.run(
        lm.inputs(batch.clean), clean, through := _Through(suite), stop=False, grad=True
    ).logits
    wrong = torch.autograd.grad(batch.metric(logits).sum(), through.entered)[0]
    assert not torch.allclose(wrong, plain[0], rtol=0.1)


@pytest.mark.parametrize("layer", [0, 2])
def test_integrated_gradients_of_a_layer_approach_the_change_of_the_metric(
    lm: Any, layer: int
) -> None:
    batch = one_batch()
    clean, patch = (lm.acts(x, [layer]) for x in (batch.clean, batch.patch))
    here, there = (
        batch.metric(lm.run(lm.inputs(x), [], lambda *_: None, stop=False).logits)
        for x in (batch.clean, batch.patch)
    )
    errors = []
    for steps in (2, 40):
        g = gradients(lm, batch, clean, patch, "ig", steps)[layer]
        effect = (g * (patch[layer] - clean[layer])).sum((1, 2))
        errors.append(float((effect - (there - here)).abs().max()))
    assert errors[1] < errors[0] / 20


def everything(saes: Any, inside: bool) -> Circuit:
    return {x: torch.full((sae.d_sae,), inside) for x, sae in saes.items()}


def test_the_full_circuit_is_the_model_bit_for_bit_and_without_errors_the_spliced_one(
    lm: Any, suite: Suite
) -> None:
    subject, batch = subject_of(suite, lm), one_batch()
    saes = {sae.layer: sae for sae in suite}
    ablation = patched(subject, batch, saes)
    inputs = lm.inputs(batch.clean, last_logits=True)
    model = batch.metric(lm.run(inputs, [], lambda *_: None, stop=False).logits)
    full = run_circuit(subject, batch, saes, everything(saes, True), ablation, "keep")
    assert torch.equal(full, model)
    full = run_circuit(subject, batch, saes, everything(saes, True), ablation, "none")
    spliced = lm.run(
        lm.inputs(batch.clean), saes, lambda layer, x: saes[layer](x), stop=False
    ).logits
    torch.testing.assert_close(full, batch.metric(spliced))


def test_ablating_all_of_one_layer_gives_the_run_of_the_other_prompt(lm: Any) -> None:
    batch = one_batch()
    suite = suite_of(identity(16), layers=(1,))
    subject, saes = subject_of(suite, lm), {1: suite[1]}
    empty = everything(saes, False)
    found = run_circuit(subject, batch, saes, empty, patched(subject, batch, saes), "none")
    # position by position the residual is that of the patch run, so the metric changes its sign
    other = batch.metric(lm.run(lm.inputs(batch.patch), [], lambda *_: None, stop=False).logits)
    torch.testing.assert_close(found, other)
    clean = batch.metric(lm.run(lm.inputs(batch.clean), [], lambda *_: None, stop=False).logits)
    assert clean[0] == -other[1]
    assert clean[1] == -other[0]


def test_with_exact_saes_both_ways_to_treat_errors_agree_and_norm_factors_matter(lm: Any) -> None:
    suite = suite_of(identity(16))
    subject, batch, saes = subject_of(suite, lm), one_batch(), {sae.layer: sae for sae in suite}
    circuit = everything(saes, True)
    for latents in circuit.values():
        latents[::3] = False
    keep, none = (
        run_circuit(subject, batch, saes, circuit, patched(subject, batch, saes), errors)
        for errors in ("keep", "none")
    )
    torch.testing.assert_close(none, keep)
    made = TopK(d_model=16, d_sae=64, k=4, generator=torch.Generator().manual_seed(1))
    made.b_enc.data += 0.1  # so that latents are not in proportion to the scale
    swapped = {"0": FACTORS["2"], "1": FACTORS["1"], "2": FACTORS["0"]}
    found = []
    for factors in (FACTORS, swapped):
        suite = suite_of(made, factors=factors)
        saes = {sae.layer: sae for sae in suite}
        ablation = patched(subject_of(suite, lm), batch, saes)
        every = everything(saes, True)
        found.append(run_circuit(subject_of(suite, lm), batch, saes, every, ablation, "none"))
    assert not torch.allclose(*found)


def test_with_constant_ablation_the_empty_circuit_is_alike_for_all_prompts(lm: Any) -> None:
    suite = suite_of(identity(16))
    subject, saes = subject_of(suite, lm), {sae.layer: sae for sae in suite}
    batch = next(batches([p for p in pairs(4) if len(p.prompts[0]) == 5], 8, CPU, sides=1))
    constant = {layer: torch.rand(5, 32, dtype=torch.float64) for layer in saes}
    found = run_circuit(subject, batch, saes, everything(saes, False), constant, "none")
    torch.testing.assert_close(found, found[:1].expand_as(found))


class Sum(nn.Module):
    """A linear model: tokens, two blocks that do nothing, and two answers, dimensions 1 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        weights = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
        weights[:4, 1], weights[:4, 4], weights[4:, 1], weights[4:, 4] = 2.0, 0.5, 0.5, 2.0
        self.embed = nn.Embedding.from_pretrained(weights.double())

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=x[..., [1, 4]].repeat(1, 1, 4))


def test_a_planted_circuit_is_recovered_and_random_latents_are_not_it() -> None:
    lm, suite = hooked(Sum(), 2, d_model=6), suite_of(identity(6), layers=(1,))
    subject, saes = subject_of(suite, lm), {1: suite[1]}
    both = [Pair(((i, j), (i, j + 4)), ((0,), (1,))) for i in range(4) for j in range(4)]
    (batch,) = batches(both, 64, CPU)
    found = attribute(lm, [batch], suite, "ig_inputs", 5, lambda *_: None)
    effects = {1: found["all", 1]}
    order = Order(effects, "global")
    assert order.first(2)[1].nonzero().flatten().tolist() == [1, 4]
    ablation = patched(subject, batch, saes)

    def ratio(circuit: Circuit) -> float:
        empty, model = (
            run_circuit(subject, batch, saes, everything(saes, x), ablation, "keep").mean()
            for x in (False, True)
        )
        m = run_circuit(subject, batch, saes, circuit, ablation, "keep").mean()
        return float((m - empty) / (model - empty))

    assert ratio(order.first(2)) == pytest.approx(1)
    assert ratio(order.first(1)) == pytest.approx(0.5)
    assert ratio(without(order.first(2))) == pytest.approx(0)
    drawn = [
        ratio(Order(effects, "global", torch.Generator().manual_seed(i)).first(2))
        for i in range(20)
    ]
    assert np.mean(drawn) < 0.6
    per_layer = Order(effects, "per_layer").first(2)
    assert torch.equal(per_layer[1], order.first(2)[1])


def test_areas_by_hand_and_of_a_perfect_circuit() -> None:
    grid = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    perfect = areas(np.ones((10, 3)), 1000 * grid, grid)
    np.testing.assert_allclose(perfect["area"], 1)
    np.testing.assert_allclose(perfect["cpr"], 0.999)
    np.testing.assert_allclose(perfect["cmd"], 0)
    found = areas(np.array([0.0, 1.0, 2.0]), np.array([1, 10, 1000]), np.array([0.1, 0.2, 0.5]))
    assert found["area"] == pytest.approx((0.5 * 1 + 1.5 * 2) / 3)
    assert found["cpr"] == pytest.approx(0.5 * 0.1 + 1.5 * 0.3)
    assert found["cmd"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)
    assert found["linear"] == pytest.approx((0.5 * 9 + 1.5 * 990) / 999)


# ---- tasks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_lm)


def rows(*lines: Any) -> str:
    keys = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    return "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)


def bundled() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "groupsae" / "models/tiny")


def test_shipped_tasks_have_pairs_that_are_never_in_both_halves() -> None:
    tokenizer = bundled()
    english = {"ioi", "greater_than", "greater_than_digits", "agreement"}
    for name in set(shipped()) - english:
        task = make_task(name, tokenizer, 24, 24, seed=0, bos=False)
        assert len(task.train) == len(task.test) == 24, name
        halves = [{frozenset(p.prompts) for p in half} for half in (task.train, task.test)]
        assert not halves[0] & halves[1], name
        assert all(len(a) == len(b) and a != b for p in task.train for a, b in [p.prompts])
        assert task == make_task(name, tokenizer, 24, 24, seed=0, bos=False)


class Characters(PreTrainedTokenizerBase):
    """A tokenizer with a token for each character."""

    def __call__(self, text: Any, add_special_tokens: bool = False, **_: Any) -> Any:
        return {"input_ids": list(map(ord, text))}


def test_years_are_compared_also_where_numbers_are_split_into_digits() -> None:
    task = make_task("greater_than_digits", Characters(), 8, 8, seed=0, bos=False)
    for pair in task.train:
        for prompt, answers, others in zip(
            pair.prompts, pair.answers, reversed(pair.answers), strict=True
        ):
            text = "".join(map(chr, prompt))
            third = int(text[text.index("year ") + 7])
            assert text.endswith(text[text.index("year ") + 5 :][:2])
            assert {int(chr(answer)) > third for answer in answers} == {True}
            if third:  # the answers to the earlier year are no answers to the later one
                assert {int(chr(answer)) < third for answer in others} == {True}
    with pytest.raises(UserError, match="an answer of several tokens"):
        make_task("greater_than", Characters(), 8, 8, seed=0, bos=False)


def test_pairs_that_cannot_be_compared_are_refused_with_the_reason(tmp_path: Path) -> None:
    tokenizer, file = bundled(), tmp_path / "mine.jsonl"
    good = [(f"x{i} = data['name", f'x{i} = data["name', "']", '"]') for i in range(6)]
    file.write_text(rows(*good))
    task = make_task(str(file), tokenizer, 10, 10, seed=0, bos=True)
    assert (task.name, len(task.train), len(task.test)) == ("mine", 3, 3)
    assert task.train[0].prompts[0][0] == tokenizer.bos_token_id
    file.write_text(rows(*[(f"x{i} = data ", f"y{i} = data ", "name", "value") for i in range(6)]))
    with pytest.raises(UserError, match="6 have an answer that merges with the end of its prompt"):
        make_task(str(file), tokenizer, 10, 10, seed=0, bos=False)
    file.write_text('{"clean": "a"}\n')
    with pytest.raises(UserError, match=r"line 1 of .* with clean_prefix, patch_prefix"):
        check_tasks([str(file)])
    with pytest.raises(UserError, match=r"names quotes, which is no task. Did you mean quote"):
        check_tasks(["quotes"])
    with pytest.raises(UserError, match="there is no such file"):
        check_tasks(["none.jsonl"])


# ---- the part ---------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "groupings": None, "train_pairs": 4, "test_pairs": 4, "attribution": "ig_inputs", "steps": 2,
    "select": "global", "ablation": "patch", "errors": ["keep", "none"],
    "curves": ["faithfulness", "completeness", "random"], "fractions": [0.1, 0.5, 1.0],
    "completeness_fractions": None, "last_layer": True, "single_layers": True, "gate": 0.0,
    "shown": 3, "batch_size": 8, "seed": 0,
    "bootstrap": {"resamples": 50, "level": 0.9, "seed": 0},
}  # fmt: skip


class Letters(PreTrainedTokenizerBase):
    """A tokenizer of the toy model: a token for each of eight letters."""

    def __call__(self, text: Any, add_special_tokens: bool = False, **_: Any) -> Any:
        return {"input_ids": ["abcdefgh".index(letter) for letter in text]}


def test_a_grouping_loses_exactly_nothing_against_itself(tmp_path: Path) -> None:
    def twice(subject: Subject) -> Subject:
        mine = subject.groupings[0]
        baseline = replace(mine, name="per_layer", kind="per_layer")
        return Subject(**{**vars(subject), "groupings": [mine, baseline]})

    ours, _ = measured(tmp_path / "toy.jsonl", change=twice)["groupings"]
    lost = {name: each for name, each in ours.items() if name.endswith("_lost")}
    assert {"ld_recovered_lost", "faithfulness_none_lost", "cmd_keep_lost"} <= set(lost)
    assert {(each["value"], each["low"], each["high"]) for each in lost.values()} == {(0, 0, 0)}


def measured(
    file: Path, change: Callable[[Subject], Subject] = lambda same: same, **values: Any
) -> dict[str, Any]:
    suite = suite_of(identity(6), layers=(0, 1))
    subject = subject_of(suite, hooked(Sum(), 2, d_model=6))
    subject = change(Subject(**{**vars(subject), "tokenizer": Letters}))
    every = [(a, c, p) for a in "abcd" for c, p in ("ae", "bf", "cg", "dh")]
    lines = [(f"{a}{c}", f"{a}{p}", "a", "b") for a, c, p in every]
    lines += [(f"d{a}{c}", f"d{a}{p}", "a", "b") for a, c, p in every]  # of another length
    file.write_text(rows(*lines))
    return Circuits(**(VALUES | {"tasks": [str(file)]} | values)).measure(subject)


def test_the_part_finds_what_the_toy_model_does_whatever_the_batch(tmp_path: Path) -> None:
    file = tmp_path / "toy.jsonl"
    found = measured(file)
    (row,) = found["groupings"]
    assert row["ld_recovered"]["value"] == pytest.approx(1)
    assert row["ld_left"]["value"] == pytest.approx(1)
    assert row["faithfulness_keep"]["value"] == pytest.approx(row["faithfulness_none"]["value"])
    assert row["single_layers"]["value"] == pytest.approx(1)
    full = [r for r in found["curves"] if r["fraction"] == 1.0]
    assert {(r["kind"], round(r["ratio"]["value"], 9)) for r in full} == {
        ("faithfulness", 1.0), ("completeness", 0.0), ("random", 1.0),
    }  # fmt: skip
    assert {r["latent"] for r in found["latents"]} <= {1, 4}
    assert found["gate"][0]["accuracy"] == 1.0
    run = RunFiles(downstream={"circuits": json.loads(json.dumps(found))})
    assert all(table(run) is not None for table in DOWNSTREAM_TABLES["circuits"])
    figure = circuit_curves(run.downstream["circuits"])
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["errors kept", "without errors"]
    for errors, axes in zip(("keep", "none"), figure.axes, strict=True):
        drawn = {str(line.get_label()): line for line in axes.lines}
        for kind, name in (("faithfulness", "suite"), ("random", "suite, random")):
            points = [
                (row["latents"], row["ratio"]["value"])
                for row in found["curves"]
                if (row["errors"], row["kind"]) == (errors, kind)
            ]
            np.testing.assert_allclose(drawn[name].get_xydata(), points)
    latents = circuit_latents_table(run, "page.html")
    assert latents is not None
    assert {cell.link for row in latents.rows for cell in row} == {""}  # was not interpreted
    turned = measured(file, curves=["random", "completeness", "faithfulness"])
    for kind in VALUES["curves"]:  # whatever their order
        mine, theirs = (
            [row for row in each["curves"] if row["kind"] == kind] for each in (found, turned)
        )
        assert mine == theirs
    other = measured(file, batch_size=3)
    for mine, theirs in zip(found["curves"], other["curves"], strict=True):
        assert mine["ratio"]["value"] == pytest.approx(theirs["ratio"]["value"], abs=1e-12)


def test_a_task_that_the_model_fails_or_that_has_no_ratio_gives_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "toy.jsonl"
    with pytest.raises(UserError, match=r"does none of the tasks \(toy: accuracy 1.00 is below 2"):
        measured(file, gate=2)
    few = tmp_path / "few.jsonl"
    few.write_text(rows(("aa", "ab", "a", "cc")))
    with pytest.raises(UserError, match="the task .*few.jsonl: too few pairs are left"):
        measured(file, tasks=[str(few)])
    found = measured(file, tasks=[str(few), str(file)])
    assert [row["reason"] is None for row in found["gate"]] == [True, False]
    assert "1 have an answer of several tokens" in found["gate"][1]["reason"]
    tasks = DOWNSTREAM_TABLES["circuits"][1](RunFiles(downstream={"circuits": found}))
    assert tasks is not None
    assert len(tasks.rows) == 2
    suite = suite_of(identity(6), layers=(0, 1))
    with torch.no_grad():  # without latents nothing is ablated, and the errors are kept
        suite.saes["all"].W_enc.zero_()
    subject = subject_of(suite, hooked(Sum(), 2, d_model=6))
    subject = Subject(**{**vars(subject), "tokenizer": Letters})
    values = VALUES | {"errors": ["keep"], "single_layers": False}
    (row,) = Circuits(tasks=[str(file)], **values).measure(subject)["tasks"]
    assert "not clearly above 0, so no ratio is defined" in row["reason"]
    assert "faithfulness" not in row


def test_where_all_saes_leave_no_preference_the_metric_is_lost_but_half_is_recovered(
    tmp_path: Path,
) -> None:
    """Patched latents are those of the unchanged model: they do not pass through layer 0's SAE."""

    def blind(subject: Subject) -> Subject:
        none, exact = identity(6), identity(6)
        with torch.no_grad():
            none.W_dec.zero_()
        configs = {n: {"layers": [x], "norm_factors": {str(x): 1.0}} for x, n in enumerate("ab")}
        suite = Suite({"a": none, "b": exact}, configs).to(torch.float64)
        return replace(subject_of(suite, subject.lm), tokenizer=subject.tokenizer)

    (row,) = measured(tmp_path / "toy.jsonl", change=blind)["groupings"]
    assert row["ld_left"]["value"] == pytest.approx(0)
    assert row["ld_recovered"]["value"] == pytest.approx(0.5)
