"""A data module of the small model and text, on a given rank of an imagined trainer."""

from types import SimpleNamespace

import torch

from groupsae.data.activations import ActivationDataModule
from groupsae.data.files import FileSource
from groupsae.lm.load import FrozenLM

CONTEXT = 16


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
        rank: of the imagined trainer.
        world_size: of it.
        training: whether it trains or validates.
        device: that batches go to.
        store: folder and dtype of a store; what it says is appended to `data.said`.
        **changes: of the constructor's arguments.
    """
    values = {
        "context": CONTEXT, "heldout_fraction": 0.1, "calibration_fraction": 0.1,
        "prepend_bos": False, "exclude_special_tokens": False, "skip_positions": 0,
        "max_norm_ratio": None, "max_tokens": None, "blocks_per_step": 4, "blocks_per_forward": 4,
        "tokens": 6 * 4 * CONTEXT, "heldout_tokens": 10**9, "num_workers": 0, "seed": 3,
    }  # fmt: skip
    source = FileSource(path=str(text), text_column=None)
    data = ActivationDataModule(lm=lm, source=source, cache=str(cache), **(values | changes))
    data.said = []
    if store is not None:
        data.keep_in(*store, data.said.append)
    data.trainer = SimpleNamespace(
        training=training, world_size=world_size, global_rank=rank,
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )  # fmt: skip
    data.setup("fit")
    data.set_slots(slots)
    return data
