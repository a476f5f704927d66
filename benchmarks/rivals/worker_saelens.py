"""SAELens: its own `SAETrainer.fit`, fed by an iterator: worker_saelens.py <shape>."""

import sys
from collections.abc import Iterator

import torch
from activations import SHAPES, batches, fingerprint
from gate import Gate
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

STEPS = 100_000  # more than are ever asked for


def stream(made: list[torch.Tensor], gate: Gate) -> Iterator[torch.Tensor]:
    for step in range(STEPS):
        gate()
        yield made[step % len(made)]


def main(shape: str) -> None:
    gate = Gate()
    d_model, d_sae, k, rows = SHAPES[shape]
    made = batches(shape)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_model, d_sae=d_sae, k=k))
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * rows,
        train_batch_size_samples=rows,
        lr_end=3e-5,  # what the library's runner fills in; the default rate is constant
    )
    trainer = SAETrainer(cfg, sae, stream(made, gate))
    gate.ready(data=fingerprint(made), threads=torch.get_num_threads(), torch=torch.__version__)
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
