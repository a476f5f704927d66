"""What the cost of a step grows with: `python -m benchmarks.scaling [overrides]`.

One thing at a time is changed: tokens, SAEs, latents, k, and how many layers share an SAE, for
which peak memory is measured as well. Real steps by Lightning on the bundled model, all cases in
turn in every round. Overrides are those of groupsae.train. Three minutes on two cores;
`size=smallest` takes seconds. Writes benchmarks/results/scaling.md and .png, with the overrides
in their names.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import RESULTS, interleaved, now, smallest, variant, without_size, write
from groupsae.app.run_folder import register_resolver
from groupsae.app.stream import make_source
from groupsae.config.instantiate import CONF, make
from groupsae.data.activations import ActivationDataModule
from groupsae.grouping.partition import Partition
from groupsae.grouping.plan import GroupPlan
from groupsae.runtime.memory import keep_freed_memory
from groupsae.runtime.quiet import quiet
from groupsae.training.suite import GroupSAESuite

ROUNDS, WARM, STEPS, LAYERS = 3, 2, 4, 12
BASE = {"blocks": 4, "saes": 2, "d_sae": 4096, "k": 32, "layers": 0}
SWEEPS = {
    "blocks": ("blocks of 256 tokens in a step", [1, 2, 4, 8, 16]),
    "saes": ("SAEs, of 12 layers", [1, 2, 3, 4, 6, 12]),
    "d_sae": ("latents", [1024, 2048, 4096, 8192, 16384]),
    "k": ("k", [8, 16, 32, 64, 128]),
    "layers": ("layers that share the one SAE", [1, 2, 4, 8, 12]),
}
if smallest():
    SWEEPS = {what: (title, values[:2]) for what, (title, values) in SWEEPS.items()}


@dataclass
class Case:
    """One set of sizes, ready to be trained for a few steps again and again."""

    suite: GroupSAESuite
    data: ActivationDataModule
    trainer: dict[str, Any]

    def fit(self, watch: L.Callback) -> None:
        """Take a few steps."""
        self.data.blocks_seen = 0
        L.Trainer(
            **self.trainer, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            limit_val_batches=0, use_distributed_sampler=False, log_every_n_steps=10**9,
            callbacks=[watch],
        ).fit(self.suite, datamodule=self.data)  # fmt: skip


class Clock(L.Callback):
    """Seconds of a step, and of the language model in it, after some steps to warm up."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """Start after the last step to warm up, stop after the last one."""
        model = trainer.datamodule.stopwatch.seconds
        if trainer.global_step == WARM:
            self.start, self.model_start = now(pl_module.device), model
        if trainer.global_step == WARM + STEPS:
            self.step = (now(pl_module.device) - self.start) / STEPS
            self.model = (model - self.model_start) / STEPS


class Memory(L.Callback):
    """The most bytes that one step holds beyond weights and the optimiser's state."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        """Watch one step from its loader to its end."""
        cuda, device = pl_module.device.type == "cuda", pl_module.device
        if trainer.global_step == WARM:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                self.before = torch.cuda.memory_allocated(device)
            else:
                self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profile.__enter__()
        elif trainer.global_step == WARM + 1:
            if cuda:
                self.bytes = torch.cuda.max_memory_allocated(device) - self.before
            else:
                self.profile.__exit__(None, None, None)
                self.bytes = peak(self.profile)


def peak(watched: profile) -> int:
    """Return the most bytes that were held at once of what was allocated meanwhile."""
    changes, waiting = [], list(watched.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.name == "[memory]":
            fields = event.extra_fields
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    held = most = 0
    ours = set()
    for _, place, size in sorted(changes):
        if size < 0 and place not in ours:  # was there before
            continue
        (ours.add if size > 0 else ours.discard)(place)
        held += size
        most = max(most, held)
    return most


def plan_of(saes: int, layers: int) -> GroupPlan:
    """Return `saes` groups of all layers, or one of the last so many `layers` if that is given."""
    groups = [part.tolist() for part in np.array_split(np.arange(LAYERS), saes)]
    unserved: tuple[int, ...] = ()
    if layers:
        unserved = tuple(range(LAYERS - layers))
        groups = [*([x] for x in unserved), list(range(LAYERS - layers, LAYERS))]
    partition = Partition(groups, [float("nan")] * len(groups), "explicit")
    return GroupPlan(partition, "group", LAYERS, unserved=unserved)


def prepared(folder: str, overrides: Sequence[str], sizes: dict[str, int]) -> Case:
    """Return the case of some sizes."""
    given = [
        f"output={folder}", "model=tiny", f"sae.d_sae={sizes['d_sae']}", "sae.expansion=null",
        f"sae.k={sizes['k']}", f"stream.blocks_per_step={sizes['blocks']}",
        "stream.max_tokens=400_000", "stream.heldout_fraction=0.1",
        "stream.calibration_fraction=0.1", *overrides,
    ]  # fmt: skip
    if smallest():
        given += ["stream.context=16"]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("train", given)
    lm, plan = make(cfg.model), plan_of(sizes["saes"], sizes["layers"])
    tokens = (WARM + STEPS) * sizes["blocks"] * cfg.stream.context
    data = ActivationDataModule(
        lm=lm, source=make_source(cfg.data), cache=folder, tokens=tokens, seed=0, **cfg.stream
    )
    data.set_slots(plan.slots)
    suite = GroupSAESuite(
        sae=make(cfg.sae),
        d_model=lm.geometry.d_model,
        optim=make(cfg.optim),
        dead_after=cfg.dead_after,
        b_dec_start="zero",
        nonfinite="stop",
        seed=0,
    )
    suite.set_plan(plan, dict.fromkeys(range(LAYERS), 0.1))
    return Case(suite, data, make(cfg.trainer))


def seconds(case: Case, models: list[float]) -> float:
    """Return the seconds of a step; note those of the language model."""
    clock = Clock()
    case.fit(clock)
    models.append(clock.model)
    return clock.step


def main(overrides: Sequence[str]) -> None:
    """Measure all cases; write tables and figure."""
    quiet()
    register_resolver()
    keep_freed_memory()
    overrides = without_size(overrides)
    every: dict[str, dict[str, int]] = {}
    for what, (_, values) in SWEEPS.items():
        for value in values:
            sizes = BASE | {what: value}
            every.setdefault(str(sizes), sizes)
    with tempfile.TemporaryDirectory() as folder:
        cases = {key: prepared(folder, overrides, sizes) for key, sizes in every.items()}
        models: dict[str, list[float]] = {key: [] for key in cases}
        blocks = {key: partial(seconds, case, models[key]) for key, case in cases.items()}
        steps = interleaved(blocks, ROUNDS, "scaling")
        memory = {}
        for value in SWEEPS["layers"][1]:
            watch = Memory()
            cases[str(BASE | {"layers": value})].fit(watch)
            memory[value] = watch.bytes
    device = next(iter(cases.values())).data.device
    model = {key: min(found[1:]) for key, found in models.items()}
    parts, curves = [], {}
    for what, (title, values) in SWEEPS.items():
        keys = [str(BASE | {what: value}) for value in values]
        step, lm = ([1000 * f(k) for k in keys] for f in (lambda k: steps[k].least, model.get))
        curves[what] = (step, lm)
        parts.append(table(title, values, step, lm, memory if what == "layers" else None))
    if not smallest():
        figure(curves, memory)
    write(
        "scaling",
        "What the cost of a step grows with",
        "\n\n".join([*parts, f"![the tables as curves](scaling{variant()}.png)"]),
        device,
        f"ms, least of {ROUNDS} rounds of {STEPS} steps, all cases in turn in each. Where a table "
        f"does not say otherwise: {256 * BASE['blocks']:,} tokens in a step, {BASE['saes']} SAEs "
        f"of {BASE['d_sae']:,} latents, k {BASE['k']}, the bundled model's 12 layers of width "
        "128. SAEs: all that is not the language model; `times` is against the first row. Memory: "
        "the most that a step holds at once, beyond weights and the optimiser's state. (To keep "
        "the activations of every layer would take 0.5 MB more for each.)",
    )


def table(
    title: str,
    values: Sequence[int],
    step: Sequence[float],
    model: Sequence[float],
    memory: dict[int, int] | None,
) -> str:
    """Return one table in Markdown."""
    lines = [
        f"| {title} | step | language model | SAEs | times |" + " memory, MB |" * bool(memory),
        "|---|---|---|---|---|" + "---|" * bool(memory),
    ]
    for value, whole, lm in zip(values, step, model, strict=True):
        times = (whole - lm) / (step[0] - model[0])
        line = f"| {value:,} | {whole:.1f} | {lm:.1f} | {whole - lm:.1f} | {times:.2f} |"
        lines.append(line + (f" {memory[value] / 2**20:.1f} |" if memory else ""))
    return "\n".join(lines)


def figure(
    curves: dict[str, tuple[Sequence[float], Sequence[float]]], memory: dict[int, int]
) -> None:
    """Draw the tables."""
    drawn, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
    for axis, (what, (step, model)) in zip(axes.flat, curves.items(), strict=False):
        title, values = SWEEPS[what]
        saes = np.subtract(step, model)
        axis.plot(values, saes, "o-", label="SAEs")
        axis.plot(values, model, "s--", color="grey", label="language model")
        axis.set(xlabel=title, ylabel="ms in a step")
        if what in ("k", "d_sae", "blocks"):
            axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{v:,}" for v in values])
        if what in ("d_sae", "blocks"):  # both grow with them: a straight line
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        else:
            axis.set_ylim(0, None)
        axis.minorticks_off()
    axes.flat[0].legend()
    axis = axes.flat[-1]
    axis.plot(list(memory), [b / 2**20 for b in memory.values()], "o-")
    axis.set(xlabel=SWEEPS["layers"][0], ylabel="peak memory of a step, MB", ylim=(0, None))
    RESULTS.mkdir(exist_ok=True)
    drawn.savefig(RESULTS / f"scaling{variant()}.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
