"""Pretrain the bundled language model: `python -m groupsae.pretrain`."""

import json
import platform
import sys
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from groupsae.config.arguments import CONF, check_arguments, make
from groupsae.data.loader import StepSampler, make_loader
from groupsae.data.packing import Packing, Split, load_token_blocks, split_of
from groupsae.files.atomic import write_json
from groupsae.files.reading import read_metrics
from groupsae.lm.build import build_gpt_neox, stack_layers, train_tokenizer
from groupsae.runtime.errors import UserError
from groupsae.training.allocator import keep_freed_memory
from groupsae.training.loggers import MetricsCSV
from groupsae.training.model_card import model_card
from groupsae.training.pretraining import LanguageModel, bits_per_byte


def pretrain(cfg: DictConfig) -> dict[str, Any]:
    """Train, evaluate on the held-out files, save; return the held-out figures."""
    keep_freed_memory()
    L.seed_everything(cfg.seed, verbose=False)
    output, cache = Path(cfg.output), Path(cfg.cache)
    source = make(cfg.source)
    packing = Packing(
        context=cfg.model.context + 1,
        prepend_bos=False,
        max_tokens=None,
        heldout_fraction=cfg.data.heldout_fraction,
        calibration_fraction=cfg.data.calibration_fraction,
    )

    tokenizer_file = cache / f"tokenizer-{cfg.model.vocab_size}"
    if not tokenizer_file.exists():
        fractions = (cfg.data.heldout_fraction, cfg.data.calibration_fraction)
        texts = [d.text for d in source.documents() if split_of(d.name, *fractions) == "train"]
        every = max(1, sum(map(len, texts)) // int(cfg.data.tokenizer_megabytes * 1e6))
        print(f"learning a tokenizer on every {every}th of {len(texts):,} files")
        train_tokenizer(
            islice(texts, 0, None, every), cfg.model.vocab_size, cfg.model.context
        ).save_pretrained(tokenizer_file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_file)
    blocks = load_token_blocks(source, tokenizer, packing, cache / "tokens")
    print({s: f"{len(b):,} blocks" for s, b in blocks.blocks.items()})

    lm = build_gpt_neox(**cfg.model)
    if cfg.init is not None:
        stack_layers(GPTNeoXForCausalLM.from_pretrained(cfg.init), lm)
    num_steps = cfg.tokens // (cfg.data.blocks_per_step * cfg.model.context)
    module = LanguageModel(lm=lm, num_steps=num_steps, **cfg.optim)

    checkpoint = output / "checkpoints" / "last.ckpt" if cfg.resume else None
    done = torch.load(checkpoint, mmap=True, weights_only=True)["global_step"] if checkpoint else 0

    def loader(
        split: Split, num_steps: int, seed: int | None, first_step: int = 0
    ) -> torch.utils.data.DataLoader[torch.Tensor]:
        sampler = StepSampler(
            num_blocks=len(blocks.blocks[split]),
            blocks_per_step=cfg.data.blocks_per_step,
            num_steps=num_steps,
            seed=seed,
            first_step=first_step,
            rank=0,
            world_size=1,
        )
        pin = torch.cuda.is_available()
        return make_loader(blocks.blocks[split], sampler, num_workers=0, pin_memory=pin)

    all_heldout = (
        min(len(blocks.blocks["heldout"]), cfg.final_eval_blocks) // cfg.data.blocks_per_step
    )
    trainer = L.Trainer(
        **cfg.trainer,
        max_steps=num_steps,
        logger=MetricsCSV(folder=str(output)),
        val_check_interval=cfg.eval_every,
        limit_val_batches=cfg.eval_blocks // cfg.data.blocks_per_step,
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
    trainer.fit(
        module,
        loader("train", num_steps, cfg.seed, done),
        loader("heldout", all_heldout, None),
        ckpt_path=checkpoint,
    )

    history = read_history(output / "metrics.csv", cfg)  # before the last, larger evaluation

    trainer.limit_val_batches = 1.0
    heldout = trainer.validate(module, loader("heldout", all_heldout, None), verbose=False)
    tokens = blocks.blocks["heldout"][: all_heldout * cfg.data.blocks_per_step]
    num_bytes = sum(
        len(t.encode()) for t in tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    )
    nats = heldout[0]["heldout/loss"]
    stage = {
        "num_layers": cfg.model.num_layers,
        "command": command(),
        "train_tokens": num_steps * cfg.data.blocks_per_step * cfg.model.context,
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
        "tokens_per_step": cfg.data.blocks_per_step * cfg.model.context,
        "corpus": f"{blocks.manifest['documents']:,} distinct Python files: the standard library "
        "and the source of the packages pinned in constraints.txt",
        "train_tokens": sum(s["train_tokens"] for s in stages),
        "heldout_nats_per_token": nats,
        "heldout_tokens": int(tokens[:, 1:].size),
        "heldout_bits_per_byte": bits_per_byte(nats, tokens[:, 1:].size, num_bytes),
        "hardware": f"{torch.get_num_threads()} threads of {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()})"
        if trainer.strategy.root_device.type == "cpu"
        else torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "stages": stages,
    }
    lm.bfloat16().save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    write_json(output / "model" / "training.json", result)
    (output / "model" / "README.md").write_text(model_card(result))
    print(json.dumps(result, indent=1))
    return result


def command() -> str:
    """Return the command line of this run."""
    return " ".join(["python -m groupsae.pretrain", *HydraConfig.get().overrides.task])


def read_history(path: Path, cfg: DictConfig) -> list[tuple[int, float]]:
    """Return (tokens, held-out loss) of every evaluation in a `metrics.csv`."""
    return [
        ((step + 1) * cfg.data.blocks_per_step * cfg.model.context, value)
        for step, name, value in read_metrics(path)
        if name == "heldout/loss"
    ]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")
def run(cfg: DictConfig) -> None:
    """Run one configuration of the command."""
    try:
        pretrain(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Start `python -m groupsae.pretrain`."""
    check_arguments(sys.argv[1:], "pretrain")
    run()


if __name__ == "__main__":
    main()
