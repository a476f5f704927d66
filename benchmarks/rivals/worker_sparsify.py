"""sparsify: its own `Trainer.fit`, on given activations or on a language model.

- `worker_sparsify.py <shape> <optimizer>`: a stub LM whose only layer returns activations
- `worker_sparsify.py loop <LM's folder>`: the whole loop, Adam, one SAE per layer
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from activations import SHAPES, batches, fingerprint
from gate import Gate
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import nn

BLOCKS, CONTEXT = 8, 256
STEPS = 100_000  # more than are ever asked for: the trainer must not come to its end


class StubLM(nn.Module):
    """A language model of one layer, whose output is the next batch of activations."""

    def __init__(self, made: list[torch.Tensor]) -> None:
        super().__init__()
        self.made, self.turn = made, 0
        self.layers = nn.ModuleList([nn.Identity()])
        self.base_model = self
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(BLOCKS, CONTEXT, dtype=torch.int64)}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the next batch, through the hooked layer."""
        self.turn += 1
        return self.layers[0](self.made[self.turn % len(self.made)].view(BLOCKS, CONTEXT, -1))


class Tokens(torch.utils.data.Dataset):
    """Blocks of tokens, over and over."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return STEPS * BLOCKS

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[i % len(self.blocks)]}


def main(what: str, choice: str) -> None:
    gate = Gate()
    if what == "loop":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(choice, dtype=torch.float32)
        lines = (Path(choice) / "tokens.jsonl").read_text().splitlines()
        tokens = torch.tensor([json.loads(line)["tokens"] for line in lines])
        dataset, optimizer, same_data = Tokens(tokens.view(-1, CONTEXT)), "adam", ""
        d_sae, k = SHAPES["S1"][1:3]
    else:
        made = batches(what)
        model, dataset = StubLM(made), Tokens(torch.zeros(BLOCKS, CONTEXT, dtype=torch.int64))
        _, d_sae, k, _ = SHAPES[what]
        optimizer, same_data = choice, fingerprint(made)
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=d_sae, k=k),
        batch_size=BLOCKS,
        optimizer=optimizer,
        save_every=STEPS,
        log_to_wandb=False,
        save_dir=tempfile.gettempdir(),
    )
    trainer = Trainer(cfg, dataset, model)
    model.register_forward_pre_hook(lambda *_: gate())
    gate.ready(data=same_data, threads=torch.get_num_threads(), torch=torch.__version__)
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
