"""Trains the bundled language model, evaluates it on held-out files and saves it."""

import json
import platform
import shlex
import sys
from datetime import date
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch.utils.data import DataLoader
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from benchmarks.pretraining.card import model_card
from benchmarks.pretraining.model import (
    LanguageModel,
    bits_per_byte,
    build_gpt_neox,
    stack_layers,
    train_tokenizer,
)
from benchmarks.timing import smallest
from groupsae.data.loader import BlockLoader, StepSampler
from groupsae.data.packing import Packing, Split, load_token_blocks, split_of
from groupsae.data.sources import PythonSource
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_metrics
from groupsae.runtime.memory import keep_freed_memory
from groupsae.training.loggers import MetricsCSV

SMALLEST = (
    "tokens=4096", "model.num_layers=2", "model.d_model=32", "model.vocab_size=300",
    "model.context=32", "data.packages=false", "data.max_tokens=100_000",
    "data.tokenizer_megabytes=0.05", "data.heldout_fraction=0.2", "data.blocks_per_step=8",
    "eval_every=8", "eval_blocks=8", "final_eval_blocks=16", "checkpoint_every=8",
)  # fmt: skip


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent), config_name="pretrain")
def pretrain(cfg: DictConfig) -> None:
    """Train, evaluate on the held-out files, save; print the held-out figures."""
    keep_freed_memory()
    L.seed_everything(cfg.seed, verbose=False)
    output, per_step = Path(cfg.output), cfg.data.blocks_per_step
    source = PythonSource(packages=cfg.data.packages)
    tokenizer = _tokenizer(cfg, source)
    packing = Packing(
        context=cfg.model.context + 1,
        prepend_bos=False,
        max_tokens=cfg.data.max_tokens,
        heldout_fraction=cfg.data.heldout_fraction,
        calibration_fraction=cfg.data.calibration_fraction,
    )
    blocks = load_token_blocks(source, tokenizer, packing, Path(cfg.cache) / "tokens")
    print({s: f"{len(b):,} blocks" for s, b in blocks.blocks.items()})

    lm = build_gpt_neox(**cfg.model)
    if cfg.init is not None:
        stack_layers(GPTNeoXForCausalLM.from_pretrained(cfg.init), lm)
    tokens_per_step = per_step * cfg.model.context
    num_steps = cfg.tokens // tokens_per_step
    module = LanguageModel(lm=lm, num_steps=num_steps, **cfg.optim)
    checkpoint = output / "checkpoints" / "last.ckpt" if cfg.resume else None
    done = torch.load(checkpoint, mmap=True, weights_only=True)["global_step"] if checkpoint else 0

    def loader(
        split: Split, num_steps: int, seed: int | None, first_step: int = 0
    ) -> DataLoader[torch.Tensor]:
        sampler = StepSampler(
            num_blocks=len(blocks.blocks[split]),
            blocks_per_step=per_step,
            num_steps=num_steps,
            seed=seed,
            first_step=first_step,
            rank=0,
            world_size=1,
        )
        pin = torch.cuda.is_available()
        return BlockLoader(blocks.blocks[split], sampler, num_workers=0, pin_memory=pin)

    all_heldout = min(len(blocks.blocks["heldout"]), cfg.final_eval_blocks) // per_step
    trainer = L.Trainer(
        **cfg.trainer,
        max_steps=num_steps,
        logger=MetricsCSV(folder=str(output)),
        val_check_interval=cfg.eval_every,
        limit_val_batches=cfg.eval_blocks // per_step,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(
                dirpath=output / "checkpoints",
                save_last=True,
                every_n_train_steps=cfg.checkpoint_every,
            )
        ],
    )
    train, heldout = (
        loader("train", num_steps, cfg.seed, done),
        loader("heldout", all_heldout, None),
    )
    trainer.fit(module, train, heldout, ckpt_path=checkpoint)
    rows = read_metrics(output / "metrics.csv")  # before the last, larger evaluation
    history = [((step + 1) * tokens_per_step, x) for step, key, x in rows if key == "heldout/loss"]
    trainer.limit_val_batches = 1.0
    (figures,) = trainer.validate(module, loader("heldout", all_heldout, None), verbose=False)

    nats, given = figures["heldout/loss"], HydraConfig.get().overrides.task
    tokens = blocks.blocks["heldout"][: all_heldout * per_step][:, 1:]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    stage = {
        "num_layers": cfg.model.num_layers,
        "command": shlex.join(["python", "-m", "benchmarks.pretraining", *given]),
        "train_tokens": num_steps * tokens_per_step,
        "heldout_history": history,
    }
    before = json.loads((Path(cfg.init) / "training.json").read_text()) if cfg.init else None
    stages = [*(before["stages"] if before else []), stage]
    result = {
        "name": cfg.name,
        **cfg.model,
        **cfg.optim,
        "betas": list(cfg.optim.betas),
        "eval_tokens": cfg.eval_blocks * cfg.model.context,
        "tokens_per_step": tokens_per_step,
        "corpus": f"{blocks.manifest['documents']:,} distinct Python files: the standard library "
        "and the source of the packages pinned in constraints.txt",
        "train_tokens": sum(s["train_tokens"] for s in stages),
        "heldout_nats_per_token": nats,
        "heldout_tokens": int(tokens.size),
        "heldout_bits_per_byte": bits_per_byte(
            nats, tokens.size, sum(len(text.encode()) for text in texts)
        ),
        "hardware": _hardware(trainer.strategy.root_device),
        "date": date.today().isoformat(),
        "stages": stages,
    }
    lm.bfloat16().save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    write_json(output / "model" / "training.json", result)
    (output / "model" / "README.md").write_text(model_card(result), encoding="utf-8")
    print(json.dumps(result, indent=1))


def _tokenizer(cfg: DictConfig, source: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of this size, learned on the training files unless it is cached."""
    folder = Path(cfg.cache) / f"tokenizer-{cfg.model.vocab_size}"
    if not folder.exists():
        fractions = (cfg.data.heldout_fraction, cfg.data.calibration_fraction)
        texts = [d.text for d in source.documents() if split_of(d.name, *fractions) == "train"]
        every = max(1, sum(map(len, texts)) // int(cfg.data.tokenizer_megabytes * 1e6))
        print(f"learning a tokenizer on every {every}th of {len(texts):,} files")
        some = islice(texts, 0, None, every)
        train_tokenizer(some, cfg.model.vocab_size, cfg.model.context).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} threads of {platform.machine()} ({capability})"


if __name__ == "__main__":
    if smallest():
        with TemporaryDirectory() as folder:
            sys.argv[1:] = [*SMALLEST, f"output={folder}/out", f"cache={folder}/cache"]
            pretrain()
    else:
        pretrain()
