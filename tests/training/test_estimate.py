"""What a run will need: against what a step really takes, and the refusal before it starts."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from groupsae.data.activations import ActivationDataModule
from groupsae.data.batch import ActivationBatch
from groupsae.data.draws import draw_layers
from groupsae.grouping.choices import All
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from groupsae.runtime.memory import keep_freed_memory
from groupsae.sae.base import SAE
from groupsae.sae.topk import TopK
from groupsae.training import estimate
from groupsae.training.estimate import Trial, TrialData, bytes_free, bytes_needed, refuse
from groupsae.training.group import SAEFactory
from groupsae.training.optim import Adam
from groupsae.training.suite import GroupSAESuite
from tests.helpers.data_modules import unprepared
from tests.helpers.runs import overrides, run
from tests.helpers.saes import FAMILY

LAYERS, D_MODEL, EXPANSION, TOKENS = 6, 64, 8, 512
CPU = torch.device("cpu")


def make_sae(*, d_model: int, generator: torch.Generator, **changed: float | None) -> TopK:
    size = {"expansion": EXPANSION, **changed}
    return TopK(d_model=d_model, k=8, generator=generator, **size)


def make_suite(smaller: list[int], sae: SAEFactory = make_sae) -> GroupSAESuite:
    """Return a suite of all groupings of a model of six layers; its SAEs are not built yet."""
    suite = GroupSAESuite(
        sae=sae,
        d_model=D_MODEL,
        optim=Adam(base_lr=1e-3, base_d_sae=512),
        dead_after=10**9,
        b_dec_start="zero",
        nonfinite="stop",
        seed=0,
    )
    places = np.array([0.0, 0.1, 0.13, 0.3, 0.5, 0.9])
    choice = All(rules=["complete"], theta=0.2, smaller=smaller, last_layer="own")
    plan = choice.plan(np.abs(np.subtract.outer(places, places)))
    suite.set_plan(plan, dict.fromkeys(range(LAYERS), 1.0))
    return suite


def stream(tokens: int, rows: int = 1) -> ActivationDataModule:
    """Return a data module whose steps have so many tokens; nothing is read."""
    data = unprepared(FrozenLM(name="tiny"), "text", "cache", layers_per_token=rows)
    data.tokens_per_step = tokens
    return data


def bytes_taken(suite: GroupSAESuite, *callbacks: L.Callback, rows: int = 1) -> int:
    """Return the most bytes that were held at once while Lightning built and trained a suite."""
    data, positions = stream(TOKENS, rows), torch.arange(TOKENS)
    slots = data.each_row(suite.plan.slots)

    def batch() -> ActivationBatch:
        drawn = [
            draw_layers(positions, slot, 0, data.rows_per_token(slot)) for slot in suite.plan.slots
        ]
        acts = torch.randn(len(slots), TOKENS, D_MODEL)
        return ActivationBatch(slots, acts, torch.cat(drawn), None)

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=6, limit_val_batches=0, callbacks=[*callbacks],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        trainer.fit(suite, datamodule=TrialData(batch, 6))
    return peak(watched)


@pytest.mark.parametrize("smaller", [[], [1, 2]])
def test_weights_gradients_and_moments_are_counted_to_the_byte(smaller: list[int]) -> None:
    suite = make_suite(smaller)
    suite.configure_model()
    optimizer = suite.configure_optimizers()
    for parameter in suite.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [t for p in suite.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    counted = sum(t.numel() * t.element_size() for t in held)
    steps = 4 * len(list(suite.parameters()))  # Adam's counters of steps
    needed = bytes_needed(suite, stream(0), suite.plan.members, 1)
    if not smaller:
        assert needed == counted - steps
    # of smaller SAEs the decoder's bias is not smaller, and latents are whole numbers
    assert needed == pytest.approx(counted - steps, rel=0.01)


def test_a_second_process_takes_half_of_the_step() -> None:
    suite = make_suite([])
    nothing, one, two = (
        bytes_needed(suite, stream(tokens), suite.plan.members[:5], processes)
        for tokens, processes in ((0, 1), (TOKENS, 1), (TOKENS, 2))
    )
    assert two - nothing == (one - nothing) // 2


@pytest.mark.parametrize("smaller", [[], [1, 2]])
@pytest.mark.parametrize(("dead", "least", "most"), [(True, 0.8, 1.25), (False, 1.0, 1.8)])
def test_a_step_needs_about_the_estimate(
    smaller: list[int], dead: bool, least: float, most: float
) -> None:
    """With dead latents, for which there is a second reconstruction; less without any."""
    suite = make_suite(smaller)
    needed = bytes_needed(suite, stream(TOKENS), suite.plan.members, 1)
    callbacks = [Trial(0.0, tuple, 3)] if dead else []  # its last step is one with dead latents
    assert least < needed / bytes_taken(suite, *callbacks) < most


def test_a_step_on_several_rows_of_each_token_needs_about_the_estimate() -> None:
    suite = make_suite([])
    once, needed = (bytes_needed(suite, stream(TOKENS, n), suite.plan.members, 1) for n in (1, 3))
    assert needed > 1.2 * once
    assert 1.0 < needed / bytes_taken(suite, rows=3) < 1.8


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_a_step_of_dense_kinds_needs_about_the_estimate(kind: str) -> None:
    """What each SAE keeps for the backward pass is there for all of them at once."""
    architecture, values = FAMILY[kind]

    def dense(*, d_model: int, generator: torch.Generator, **changed: float | None) -> SAE:
        size = values | {"expansion": EXPANSION} | changed
        return architecture(d_model=d_model, generator=generator, **size)

    suite = make_suite([], dense)
    needed = bytes_needed(suite, stream(TOKENS), suite.plan.members, 1)
    assert 0.9 < needed / bytes_taken(suite) < 1.5


def peak(watched: profile) -> int:
    """Return the most bytes that were held at once of what was allocated meanwhile."""
    results = watched.profiler.kineto_results
    changes, waiting = [], list(results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])])
    return int(held.max())


def test_free_memory_is_the_machines_or_a_share_of_it() -> None:
    memory = psutil.virtual_memory()
    alone = bytes_free(CPU, 1)
    assert 0 < alone <= memory.total
    assert bytes_free(CPU, 4) == pytest.approx(alone / 4, rel=0.2)


def test_freed_memory_is_handed_back_before_free_memory_is_asked_for() -> None:
    keep_freed_memory()
    held = torch.ones(2**27)  # half a GiB
    process = psutil.Process()
    while_held = process.memory_info().rss
    del held
    bytes_free(CPU, 1)
    assert while_held - process.memory_info().rss > 2**28


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    monkeypatch.setattr(estimate, "CONTROL_GROUP", tmp_path)
    assert bytes_free(CPU, 1) == 400_000
    assert bytes_free(CPU, 2) == 200_000
    (tmp_path / "memory.max").write_text("max\n")
    assert bytes_free(CPU, 1) > 10**7


def test_saes_that_fit_exactly_are_accepted() -> None:
    refuse(10**9, 10**9, 5, CPU)


def test_the_refusal_names_the_numbers_and_what_to_reduce() -> None:
    with pytest.raises(UserError) as error:
        refuse(81_300_000_000, 7_900_000_000, 61, CPU)
    printed = str(error.value)
    assert "61 SAEs at once needs about 81.3 GB, but cpu has 7.9 GB free" in printed
    for way_out in (
        "sae.expansion",
        "stream.blocks_per_step",
        "groups.rules",
        "groups.smaller=[]",
    ):
        assert way_out in printed
    assert "-m groups=count groups.num_groups=1,2,3" in printed
    assert "\n" not in printed


# ---- complete runs --------------------------------------------------------------------------

ALL = ["groups=all", "groups.rules=[complete,even]", "groups.smaller=[1,2]"]


@dataclass
class Watched:
    """The estimates that runs make, and how often they measure the layers; `free` is scripted."""

    needed: list[int] = field(default_factory=list)
    saes: list[int] = field(default_factory=list)
    measured: int = 0
    free: Callable[[list[int]], int] = lambda needed: 10**12


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Note what is estimated and whether the layers are measured; `free` decides what fits."""
    from groupsae.training.callbacks import grouping

    notes = Watched()
    estimate, measure = grouping.bytes_needed, grouping.measure

    def noted(suite: Any, data: Any, widths: list[float], world_size: int) -> int:
        notes.needed.append(estimate(suite, data, widths, world_size))
        notes.saes.append(len(widths))
        return notes.needed[-1]

    def counted(*args: Any) -> Any:
        notes.measured += 1
        return measure(*args)

    monkeypatch.setattr(grouping, "bytes_needed", noted)
    monkeypatch.setattr(grouping, "bytes_free", lambda *_: notes.free(notes.needed))
    monkeypatch.setattr(grouping, "measure", counted)
    return notes


def test_what_can_never_fit_is_refused_before_the_layers_are_measured(
    watched: Watched, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    watched.free = lambda needed: needed[0] - 1
    with pytest.raises(UserError, match="training 1 SAE at once needs about"):
        run(overrides(tiny_lm, tiny_text, tmp_path, *ALL))
    assert watched.measured == 0
    assert not list(tmp_path.rglob("groups.json"))


def test_what_turns_out_not_to_fit_is_refused_after_grouping(
    watched: Watched, tiny_lm: Path, tiny_text: Path, tmp_path: Path
) -> None:
    watched.free = lambda needed: needed[0]
    with pytest.raises(UserError, match=r"training 1[2-9] SAEs at once needs about"):
        run(overrides(tiny_lm, tiny_text, tmp_path, *ALL))
    assert watched.measured == 1
    assert watched.saes[0] < watched.saes[1]
    assert not list(tmp_path.rglob("groups.json"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_ordinary_run_is_refused_too_and_forecasts_nothing(
    watched: Watched,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = overrides(tiny_lm, tiny_text, tmp_path, "groups=per_layer")
    watched.free = lambda needed: 0
    with pytest.raises(UserError, match="has 0.0 GB free"):
        run(arguments)
    assert watched.measured == 0
    watched.free = lambda needed: 10**12
    assert run(arguments)[0] == 0
    assert "from one stream" not in capsys.readouterr().out


def test_a_run_of_all_groupings_first_prints_what_it_will_need(
    watched: Watched,
    tiny_lm: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, folder = run(overrides(tiny_lm, tiny_text, tmp_path, *ALL))
    assert status == 0
    printed = " ".join(capsys.readouterr().out.split())
    number = len(json.loads((folder / "groups.json").read_text())["saes"])
    sentence = (
        rf"{number} SAEs from one stream: about \d+\.\d GB of memory, and by a trial of 3 steps "
        r"\d+:\d\d:\d\d of training \(\d+% of it the language model's\)\."
    )
    found = re.search(sentence, printed)
    assert found is not None
    assert found.start() < printed.index("Run folder")
