"""groupsae: `GroupSAE` in Lightning's trainer on given activations, or a whole run by config.

- `worker_groupsae.py <shape> <malloc> [overrides]`
- `worker_groupsae.py loop <LM's folder> <malloc> [overrides]`: the whole loop, by conf
- `worker_groupsae.py lm <LM's folder> <malloc>`: the forward of the language model alone

malloc: `ours` (the allocator set as in training) or `plain` (left as it is).
"""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from activations import SHAPES, batches, fingerprint
from gate import Gate
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF, make
from groupsae.data.batch import ActivationBatch
from groupsae.runtime.memory import keep_freed_memory
from groupsae.runtime.quiet import quiet
from groupsae.training.group import GroupSAE

LAYERS = [0, 1, 2]  # of the group: rows come from all of them
STEPS = 100_000  # more than are ever asked for


class Stream(L.LightningDataModule):
    """Given activations in place of a language model's; itself the loader."""

    num_steps = STEPS

    def __init__(self, made: list[torch.Tensor]) -> None:
        super().__init__()
        self.made = made

    def train_dataloader(self) -> Any:
        """Return an endless loader of batches with one slot."""
        return self

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[ActivationBatch]:
        layers = torch.arange(len(self.made[0])) % len(LAYERS)
        for step in range(STEPS):
            acts = self.made[step % len(self.made)][None]
            yield ActivationBatch([LAYERS], acts, layers[None], None)


class AtGate(L.Callback):
    """Stops a run at the gate, once a step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_batch_start(self, *_: Any) -> None:
        """Wait, or pass."""
        self.gate()


def config(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("train", ["+trainer.enable_progress_bar=false", *overrides])


def sizes(shape: str) -> list[str]:
    _, d_sae, k, _ = SHAPES[shape]
    # a model without tuned values of its own: the defaults of conf
    of_sae = ["sae.expansion=null", f"sae.d_sae={d_sae}", f"sae.k={k}"]
    return ["model=hf", "model.name=none", *of_sae]


def sae_steps(gate: Gate, shape: str, malloc: str, overrides: list[str]) -> None:
    """Train one group on given activations."""
    if malloc == "ours":
        keep_freed_memory()
    cfg = config([*sizes(shape), *overrides])
    made = batches(shape)
    norm_factor = float(torch.cat(made).square().sum(1).mean().rsqrt())
    group = GroupSAE(
        name="layers.0-2",
        layers=LAYERS,
        norm_factors=dict.fromkeys(LAYERS, norm_factor),
        sae=make(cfg.sae),
        d_model=SHAPES[shape][0],
        optim=make(cfg.optim),
        dead_after=cfg.dead_after,
        b_dec_start="zero",
        nonfinite=cfg.nonfinite,
        seed=0,
    )
    trainer = L.Trainer(
        **make(cfg.trainer),
        max_epochs=1,
        log_every_n_steps=cfg.log_every,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[AtGate(gate)],
    )
    gate.ready(data=fingerprint(made), **versions())
    trainer.fit(group, datamodule=Stream(made))


def whole_run(gate: Gate, lm: str, malloc: str, overrides: list[str]) -> None:
    """Train all groups from the language model, as `python -m groupsae.train` does."""
    from groupsae.app import fit

    folder = tempfile.mkdtemp(dir=lm)
    cfg = config(
        [
            *sizes("S1"),
            f"output={folder}",
            f"model.name={lm}",
            "data=files",
            f"data.path={lm}/tokens.jsonl",
            "stream.context=256",
            "stream.blocks_per_step=8",
            "stream.blocks_per_forward=8",
            "stream.heldout_fraction=0.1",
            "stream.calibration_fraction=0.1",
            "calibration.tokens=2048",
            f"tokens={2048 * STEPS}",
            f"eval_every={STEPS}",
            f"checkpoint_every={STEPS}",
            *overrides,
        ]
    )
    setting = keep_freed_memory if malloc == "ours" else lambda: None
    with mock.patch.object(fit, "keep_freed_memory", setting):
        run = fit.build(cfg, Path(folder) / "run", Console(stderr=True))
    run.trainer.callbacks.append(AtGate(gate))
    gate.ready(data="", **versions())
    run.trainer.fit(run.suite, datamodule=run.data)


@torch.inference_mode()
def lm_alone(gate: Gate, lm: str, malloc: str) -> None:
    """Run the language model forward, without head or cache of keys and values."""
    from transformers import AutoModel

    if malloc == "ours":
        keep_freed_memory()
    model = AutoModel.from_pretrained(lm, dtype=torch.float32).eval()
    lines = (Path(lm) / "tokens.jsonl").read_text().splitlines()
    tokens = torch.tensor([json.loads(line)["tokens"] for line in lines]).view(-1, 8, 256)
    gate.ready(data="", **versions())
    for step in range(STEPS):
        gate()
        model(tokens[step % len(tokens)], use_cache=False)


def versions() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def main(what: str, *given: str) -> None:
    gate = Gate()
    quiet()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    register_resolver()
    if what == "loop":
        lm, malloc, *overrides = given
        whole_run(gate, lm, malloc, overrides)
    elif what == "lm":
        lm_alone(gate, *given)
    else:
        malloc, *overrides = given
        sae_steps(gate, what, malloc, overrides)


if __name__ == "__main__":
    main(*sys.argv[1:])
