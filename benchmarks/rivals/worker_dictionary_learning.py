"""dictionary_learning: its own `TopKTrainer.update`: worker_dictionary_learning.py <shape>."""

import sys

import torch
from activations import SHAPES, batches, fingerprint
from dictionary_learning.trainers.top_k import TopKTrainer
from gate import Gate

STEPS = 100_000  # more than are ever asked for


def main(shape: str) -> None:
    gate = Gate()
    d_model, d_sae, k, _ = SHAPES[shape]
    made = batches(shape)
    trainer = TopKTrainer(
        steps=STEPS, activation_dim=d_model, dict_size=d_sae, k=k, layer=0, lm_name="none"
    )
    gate.ready(data=fingerprint(made), threads=torch.get_num_threads(), torch=torch.__version__)
    for step in range(STEPS):
        gate()
        trainer.update(step, made[step % len(made)])


if __name__ == "__main__":
    main(*sys.argv[1:])
