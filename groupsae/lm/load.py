"""A frozen Hugging Face language model and what the rest of the program must know of it."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from groupsae.errors import UserError
from groupsae.lm.blocks import find_blocks

BUNDLED = {"tiny": Path(__file__).parent.parent / "models" / "tiny"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a language model."""

    num_layers: int
    d_model: int
    context: int
    vocab_size: int


class FrozenLM:
    """A language model that is only ever run forward.

    Args:
        name: `tiny` (bundled), an id on the Hugging Face Hub, or a folder.
        revision: git revision on the Hub (Pythia: a training step, such as `step1000`); null is
            the newest.
        dtype: of the weights while running, such as `float32` or `bfloat16`.
    """

    def __init__(self, *, name: str, revision: str | None, dtype: str) -> None:
        self.name, self.revision = name, revision
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UserError(f"model.dtype is '{dtype}'; use float32, bfloat16 or float16.")
        self.dtype = found
        self.path = str(BUNDLED.get(name, name))
        config = self._pretrained(AutoConfig)
        needed = ("num_hidden_layers", "hidden_size", "vocab_size")
        missing = [key for key in needed if not hasattr(config, key)]
        if missing:
            raise UserError(f"model {name}: its config has no {' and no '.join(missing)}.")
        self.geometry = Geometry(
            num_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            context=getattr(config, "max_position_embeddings", None) or 2048,
            vocab_size=config.vocab_size,
        )
        self.config_json: str = config.to_json_string()

    def _pretrained(self, auto: Any, **kwargs: Any) -> Any:
        try:
            return auto.from_pretrained(self.path, revision=self.revision or "main", **kwargs)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"cannot load model '{self.name}' (revision {self.revision or 'main'}): {reason} "
                "Name a folder with a Hugging Face model, or an id on the Hub that this machine "
                "can reach or has cached; model=tiny needs no network."
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's own tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self._pretrained(AutoTokenizer)
        return tokenizer

    def load(self, device: torch.device) -> tuple[nn.Module, nn.ModuleList]:
        """Return the model without its head, frozen, on the device, and its blocks."""
        return self._freeze(self._pretrained(AutoModel, dtype=self.dtype), device)

    def load_with_head(self, device: torch.device) -> tuple[nn.Module, nn.ModuleList]:
        """Return the whole model, which gives logits, frozen, and its blocks."""
        return self._freeze(self._pretrained(AutoModelForCausalLM, dtype=self.dtype), device)

    def _freeze(self, model: nn.Module, device: torch.device) -> tuple[nn.Module, nn.ModuleList]:
        model = model.eval().requires_grad_(False).to(device)
        return model, find_blocks(model, self.geometry.num_layers)

    def fingerprint(self) -> str:
        """Return a key of config and weights: content for a folder, commit for a Hub model."""
        digest = hashlib.sha256(self.config_json.encode())
        folder = Path(self.path)
        if folder.is_dir():
            for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        else:
            config = self._pretrained(AutoConfig)
            digest.update(str(getattr(config, "_commit_hash", None) or self.revision).encode())
            digest.update(self.name.encode())
        digest.update(str(self.dtype).encode())
        return digest.hexdigest()
