"""Loads the language model that a suite was trained on.

The only file of the room that needs transformers: suites load, encode and decode without it.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError
from groupsae.runtime.trust import runs_code

WHERE = ("hookpoint", "stack", "blocks_path", "submodule")  # of `cfg.json` and of FrozenLM


def load_model(
    cfg: Mapping[str, Any],
    device: torch.device,
    *,
    name: str | None,
    revision: str | None,
    dtype: torch.dtype | str | None,
    trust_remote_code: bool,
    **load: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer that an SAE's `cfg.json` describes, but for the changes.

    The arguments are those of `Suite.load_model`.

    Raises:
        UserError: no model is named, it cannot be loaded, or needs its author's code.
    """
    found = name or cfg.get("model")
    if not found:
        raise UserError("the suite does not name its language model: give load_model(name=...).")
    recorded = cfg.get("load") or {}
    code = runs_code({key: value for key, value in recorded.items() if key not in load})
    if code is not None and not trust_remote_code:
        raise UserError(
            f"{found} was loaded with {code}, which runs code of its owner on this machine: if "
            "you trust it, give load_model(trust_remote_code=True)."
        )
    options = {**recorded, **load, **({"trust_remote_code": True} if trust_remote_code else {})}
    try:
        lm = FrozenLM(
            name=found,
            revision=revision or (None if name else cfg.get("commit") or cfg.get("revision")),
            dtype=str(dtype or cfg.get("dtype") or "float32").removeprefix("torch."),
            load=options,
            **{key: cfg[key] for key in WHERE if cfg.get(key) is not None},
        )
        model, tokenizer = lm.load_plain(device), lm.tokenizer()
    except UserError as error:
        moved = not name and str(error).startswith("cannot load")
        hint = " If it is elsewhere, give load_model(name=<folder or id>)." if moved else ""
        raise UserError(f"{error}{hint}") from error
    as_recorded = not (name or revision or dtype) and options == recorded
    if as_recorded and cfg.get("weights") not in (None, lm.fingerprint()):
        warnings.warn(
            f"{found} has other weights now than when the SAEs were trained: give the revision of "
            "that time, load_model(revision=...).",
            stacklevel=3,
        )
    return model, tokenizer
