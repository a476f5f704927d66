"""A fresh GPT-NeoX (the Pythia architecture), its tokenizer, and how it is trained."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `vocab_size` entries, trained on `texts`.

    Entry 0 is the end-of-text token (also BOS), as in Pythia's tokenizer. Every byte is in the
    vocabulary, so no token is unknown.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_gpt_neox(
    *, num_layers: int, d_model: int, num_heads: int, vocab_size: int, context: int
) -> GPTNeoXForCausalLM:
    """Return a randomly initialised GPT-NeoX, proportioned as Pythia (MLP of 4 d_model)."""
    config = GPTNeoXConfig(
        num_hidden_layers=num_layers,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_attention_heads=num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


@torch.no_grad()
def stack_layers(shallow: GPTNeoXForCausalLM, deep: GPTNeoXForCausalLM) -> None:
    """Initialise a deep model from a trained shallow one by repeating its layers.

    Layer i becomes a copy of layer i mod n; embeddings, final norm and head are copied too (the
    depth-wise "G_stack" growth of arXiv 2405.15319). So the first tokens of a deep model's
    training cost what they cost a shallow one.

    Raises:
        ValueError: the deep model's number of layers is not a multiple of the shallow model's.
    """
    n, m = shallow.config.num_hidden_layers, deep.config.num_hidden_layers
    if m % n:
        raise ValueError(f"cannot stack {n} layers into {m}: not a multiple")

    def copy(source: nn.Module, target: nn.Module) -> None:
        target.load_state_dict(source.state_dict())

    for i, layer in enumerate(deep.gpt_neox.layers):
        copy(shallow.gpt_neox.layers[i % n], layer)
    copy(shallow.gpt_neox.embed_in, deep.gpt_neox.embed_in)
    copy(shallow.gpt_neox.final_layer_norm, deep.gpt_neox.final_layer_norm)
    copy(shallow.get_output_embeddings(), deep.get_output_embeddings())


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
