"""A data module of the small model and text, on a given rank of a trainer."""

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from groupsae.data.activations import ActivationDataModule
from groupsae.data.files import FileSource
from groupsae.lm.load import FrozenLM

CONTEXT = 16


def unprepared(
    lm: FrozenLM, text: object, cache: object, **changes: object
) -> ActivationDataModule:
    """Return a data module that has read nothing yet; `changes` go to its constructor."""
    values = {
        "context": CONTEXT, "heldout_fraction": 0.1, "calibration_fraction": 0.1,
        "prepend_bos": False, "exclude_special_tokens": False, "skip_positions": 0,
        "max_norm_ratio": None, "max_tokens": None, "blocks_per_step": 4, "blocks_per_forward": 4,
        "tokens": 6 * 4 * CONTEXT, "heldout_tokens": 10**9, "num_workers": 0, "seed": 3,
    }  # fmt: skip
    source = FileSource(path=str(text), text_column=None)
    return ActivationDataModule(lm=lm, source=source, cache=str(cache), **(values | changes))


def trainer(device: str, rank: int, world_size: int, training: bool) -> L.Trainer:
    """Return the trainer of one process of several; the others are not started."""
    strategy = SingleDeviceStrategy(torch.device(device))
    strategy.global_rank, strategy.world_size = rank, world_size
    made = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made.training = training
    return made


def data_module(
    lm: FrozenLM,
    text: object,
    cache: object,
    *,
    slots: list[list[int]],
    rank: int = 0,
    world_size: int = 1,
    training: bool = True,
    device: str = "cpu",
    store: tuple[str, str] | None = None,
    **changes: object,
) -> ActivationDataModule:
    """Return a data module after `setup`.

    Args:
        lm: the language model.
        text: folder of text files.
        cache: folder for packed tokens.
        slots: sets of layers to draw from.
        rank: of this process.
        world_size: how many processes there are.
        training: whether it trains or validates.
        device: that batches go to.
        store: folder and dtype of a store; its messages are appended to `data.reported`.
        **changes: of the constructor's arguments.
    """
    data = unprepared(lm, text, cache, **changes)
    data.reported = []
    if store is not None:
        data.keep_in(*store, data.reported.append)
    data.trainer = trainer(device, rank, world_size, training)
    data.setup("fit")
    data.set_slots(slots)
    return data
