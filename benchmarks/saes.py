"""The table of docs/saes.md: `python -m benchmarks.saes [seed=0,1,2] [kinds=relu,gated] [...]`.

Trains every kind of SAE on the bundled model at its own settings (conf/model/tiny), all of them
at once on the same activations. SAEs that are trained together get bit for bit what each gets
alone, so a row is what `python -m groupsae.train sae=<kind>` gives. Penalties are set so that all
have about the same L0 on held-out text; `relu:l1_coefficient=0.3` adds an SAE with another one,
which is how they were found.

Writes the part between the two marks in docs/saes.md where all kinds and three seeds are run
without overrides. `size=smallest` trains all kinds for a few steps, with two seeds.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from benchmarks.timing import SMALLEST_RUN, smallest, without_size
from groupsae.app.fit import build
from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF, make
from groupsae.runtime.quiet import quiet
from groupsae.training.group import SAEFactory
from groupsae.training.suite import GroupSAESuite

DOC = Path(__file__).parent.parent / "docs" / "saes.md"
BEGIN, END = "<!-- figures: python -m benchmarks.saes -->", "<!-- end of figures -->"
KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "relu")
SEEDS = ("0", "1") if smallest() else ("0", "1", "2")


class Zoo(GroupSAESuite):
    """Several kinds of SAE for each group."""

    kinds: dict[str, SAEFactory]

    def configure_model(self) -> None:
        """Build one member for each kind and group."""
        if self.groups is not None:
            return
        made = []
        for kind, factory in self.kinds.items():
            self.make_sae = factory
            for planned in self.plan.members:
                named = planned._replace(name=f"{kind}/{planned.name}")
                made.append(self.make_member(named))
        self.groups = nn.ModuleDict({str(i): member for i, member in enumerate(made)})

    def serving(self):
        """Return the names of the SAEs of the first kind: what the progress bar shows."""
        first = next(iter(self.kinds))
        mine = [m for m in self.members() if m.name.startswith(f"{first}/")]
        return {layer: m.name for m in mine for layer in m.layers}


class DeadShare(L.Callback):
    """The share of dead latents over the steps of a training, of each member."""

    def __init__(self) -> None:
        self.shares: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: GroupSAESuite, *_: object) -> None:
        """Note the share of every member."""
        for member in pl_module.members():
            share = float(member.dead().double().mean())
            self.shares.setdefault(member.name, []).append(share)


def composed(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a training run."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        # the steps that the penalties were chosen with
        return compose("train", ["stream.blocks_per_step=8", *overrides])


def factory(kind: str, overrides: Sequence[str]) -> SAEFactory:
    """Return what makes a kind of SAE, such as `relu` or `relu:l1_coefficient=0.3`."""
    name, _, change = kind.partition(":")
    return make(composed([f"sae={name}", *([f"sae.{change}"] if change else []), *overrides]).sae)


def figures(
    seed: str, kinds: Mapping[str, SAEFactory], overrides: Sequence[str]
) -> dict[str, list[float]]:
    """Return kind -> FVU, L0, share of unfired latents, FLOPs of a step per token, dead share.

    FVU and L0 are means over layers; the shares are means over SAEs, that of dead latents (which
    AuxK works on) over steps as well.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        small = [f"output={folder}", *SMALLEST_RUN] if smallest() else []
        cfg = composed([f"seed={seed}", "logger=none", *overrides, *small])
        run = build(cfg, Path(folder), console)
        suite = run.suite
        keywords = {"b_dec_start": suite.b_dec_start, **suite.make_group.keywords}
        zoo = Zoo(sae=suite.make_sae, **keywords)
        zoo.kinds = dict(kinds)
        run.trainer.callbacks.append(watch := DeadShare())
        run.trainer.fit(zoo, datamodule=run.data)
        run.trainer.validate(zoo, datamodule=run.data, verbose=False)
    values = run.trainer.callback_metrics
    found = {}
    for kind in kinds:
        mine = [m for m in zoo.members() if m.name.startswith(f"{kind}/")]
        results = [each for m in mine for each in zoo.val_results[m.name]["per_layer"].values()]
        unfired = np.mean([float(values[f"val/unfired/{m.name}"]) for m in mine])
        fvu, l0 = (np.mean([float(r[key]) for r in results]) for key in ("fvu", "l0"))
        dead = statistics.mean(statistics.mean(watch.shares[m.name]) for m in mine)
        found[kind] = [float(fvu), float(l0), float(unfired), mine[0].sae.training_flops(), dead]
        console.print(
            f"seed {seed}  {kind}: FVU {fvu:.4f}, L0 {l0:.2f}, unfired {unfired:.1%}, "
            f"dead {dead:.3%} of the time"
        )
    return found


def table(every: dict[str, dict[str, list[float]]]) -> str:
    """Return the table in Markdown: mean over seeds and, for FVU, their standard deviation."""
    lines = [
        "| `sae=` | L0 | FVU | seeds' s.d. | unfired | FLOPs of a step |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        values = np.array([each[kind] for each in every.values()])
        fvu, l0, unfired, flops, _ = values.mean(0)
        lines.append(
            f"| `{kind}` | {l0:.1f} | {fvu:.4f} | {values[:, 0].std(ddof=1):.4f} "
            f"| {unfired:.1%} | {flops / every[SEEDS[0]][KINDS[0]][3]:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Train, print, and write the table if it is complete."""
    quiet()
    register_resolver()
    given = dict(a.split("=", 1) for a in arguments if a.startswith(("seed=", "kinds=")))
    rest = [a for a in without_size(arguments) if not a.startswith(("seed=", "kinds="))]
    seeds = given.get("seed", ",".join(SEEDS)).split(",")
    kinds = given.get("kinds", ",".join(KINDS)).split(",")
    factories = {kind: factory(kind, rest) for kind in kinds}
    every = {seed: figures(seed, factories, rest) for seed in seeds}
    if rest or set(kinds) != set(KINDS) or set(seeds) != set(SEEDS):
        return
    if smallest():
        print(table(every))
        return
    text = DOC.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    DOC.write_text(f"{text[:begin]}\n\n{table(every)}\n\n{text[end:]}")


if __name__ == "__main__":
    main(sys.argv[1:])
