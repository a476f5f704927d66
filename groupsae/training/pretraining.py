"""Pretraining of a small language model, so that the embedded default needs no download."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXForCausalLM


class LanguageModel(L.LightningModule):
    """Next-token cross-entropy, AdamW, linear warm-up and linear decay to zero at `num_steps`.

    `lm` is trained in place; weight decay is for matrices only, not for biases and norms.
    """

    def __init__(
        self,
        *,
        lm: GPTNeoXForCausalLM,
        lr: float,
        betas: Sequence[float],
        weight_decay: float,
        warmup_steps: int,
        num_steps: int,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.lr, self.betas, self.weight_decay = lr, (betas[0], betas[1]), weight_decay
        self.warmup_steps, self.num_steps = warmup_steps, num_steps

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats over the context predictions of each block."""
        logits = self.lm(tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch, int64 [blocks, context + 1]."""
        loss = self.loss(tokens)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Log the held-out loss."""
        self.log("heldout/loss", self.loss(tokens), prog_bar=True, batch_size=len(tokens))

    def configure_optimizers(self) -> Any:
        """Return fused AdamW with the schedule, stepped every batch."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=self.betas,
            fused=True,
        )

        def factor(step: int) -> float:
            warm = (step + 1) / max(1, self.warmup_steps)
            left = (self.num_steps - step) / max(1, self.num_steps - self.warmup_steps)
            return max(0.0, min(warm, left))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Return the loss per byte of text in bits: nats/token * tokens / bytes / ln 2."""
    return nats_per_token * num_tokens / num_bytes / math.log(2)
