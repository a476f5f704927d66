"""A small group or suite to fit on a small model's activations, as a run fits it."""

import warnings

import lightning as L
import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.data.files import FileSource
from groupsae.grouping.choices import Explicit
from groupsae.sae.topk import TopK
from groupsae.training.group import GroupSAE
from groupsae.training.optim import Adam
from groupsae.training.suite import GroupSAESuite
from tests.helpers.lms import frozen

GROUPS = [[0, 1], [2], [3]]
NORMS = {0: 1.1, 1: 0.7, 2: 0.4, 3: 0.2}  # norm factors


def tiny_sae(**kwargs):
    return TopK(expansion=4, k=4, **kwargs)


def make_optim(**changes):
    return Adam(**({"base_lr": 1e-3, "base_d_sae": 32} | changes))


def tiny_data(lm, text, cache, groups, steps=6, **changes):
    """Return the stream of some sets of layers."""
    data = ActivationDataModule(
        lm=frozen(lm), cache=str(cache),
        source=FileSource(path=str(text), text_column=None), context=32,
        heldout_fraction=0.1, calibration_fraction=0.1, prepend_bos=False,
        exclude_special_tokens=True, skip_positions=0, max_norm_ratio=None, max_tokens=None,
        blocks_per_step=4, blocks_per_forward=4,
        tokens=steps * 4 * 32, heldout_tokens=256, num_workers=0, seed=0, **changes,
    )  # fmt: skip
    data.set_slots(groups)
    return data


def fit(module, data, max_steps=None):
    """Train on the CPU, as a run does."""
    trainer = L.Trainer(
        accelerator="cpu", max_steps=max_steps or data.num_steps, logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=2, val_check_interval=data.num_steps,
        use_distributed_sampler=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # lightning 2.6 on torch 2.13
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(module, datamodule=data)
    return trainer


def tiny_group(layers, dead_after=200, sae=tiny_sae, nonfinite="stop"):
    return GroupSAE(
        name=f"layers.{layers[0]}", layers=layers, norm_factors=NORMS, sae=sae, d_model=32,
        optim=make_optim(base_lr=5e-3, clip_norm=0.05), dead_after=dead_after,
        b_dec_start="zero", nonfinite=nonfinite, seed=0,
    )  # fmt: skip


def tiny_suite(nonfinite="stop"):
    choice = Explicit(groups=GROUPS[:2], last_layer="own")
    suite = GroupSAESuite(
        sae=tiny_sae, d_model=32, optim=make_optim(base_lr=5e-3, clip_norm=0.05),
        dead_after=200, b_dec_start="zero", nonfinite=nonfinite, seed=0,
    )  # fmt: skip
    suite.set_plan(choice.plan(torch.ones(4, 4).fill_diagonal_(0).double().numpy()), NORMS)
    return suite
