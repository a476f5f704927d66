"""Where a step's time goes: `python -m benchmarks.profile_step [overrides of the default]`.

Lightning's own profiler times every hook of a real run. What is neither the language model's
forward nor the SAEs' forward and backward nor the optimiser is overhead: the loop, callbacks,
logging, the loader. Prints a table and writes it to benchmarks/results/profile_step.md.
"""

import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.profilers import SimpleProfiler
from rich.console import Console

from groupsae.config import CONF
from groupsae.fit import build
from groupsae.run import register_resolver
from groupsae.screen import quiet

RESULT = Path(__file__).parent / "results" / "profile_step.md"


def total(profiler: SimpleProfiler, *ends: str) -> float:
    """Return the seconds of all actions whose name ends so, over the training loop."""
    return sum(
        sum(seconds)
        for action, seconds in profiler.recorded_durations.items()
        if action.endswith(ends)
    )


def main(overrides: list[str]) -> None:
    """Run 100 steps and print the shares."""
    quiet()
    register_resolver()
    with tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = compose(
                "train",
                [
                    f"output={folder}",
                    "tokens=204_800",
                    "eval_every=1_000_000",
                    "calibration.tokens=20_000",
                    *overrides,
                ],
            )
        run = build(cfg, Path(folder) / "run", Console())
        profiler = SimpleProfiler()
        run.trainer.profiler = profiler
        run.trainer.fit(run.suite, datamodule=run.data)
    steps = run.trainer.global_step
    epoch = total(profiler, "run_training_epoch")
    # the one evaluation at the end of the epoch is no part of a step
    epoch -= total(profiler, "val_next", "validation_step", "on_validation_epoch_end")
    whole = total(profiler, "optimizer_step")  # Lightning runs forward and backward inside it
    parts = {
        "LM forward, drawn rows": total(profiler, "DataModule.on_after_batch_transfer"),
        "SAE forward": total(profiler, "training_step"),
        "SAE backward": total(profiler, "backward"),
    }
    parts["optimiser (clip, Adam, renorm)"] = whole - parts["SAE forward"] - parts["SAE backward"]
    parts["everything else"] = epoch - sum(parts.values())
    lines = [
        "| part | ms per step | share |",
        "|---|---|---|",
        *(f"| {name} | {1000 * s / steps:.1f} | {s / epoch:.1%} |" for name, s in parts.items()),
        f"| step | {1000 * epoch / steps:.1f} | 100 % |",
        "",
        f"{steps} steps of {run.data.tokens_per_step:,} tokens, {len(run.data.slots)} SAEs; "
        f"{torch.get_num_threads()} threads of {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, "
        f"{date.today().isoformat()}. Command: `python -m benchmarks.profile_step "
        f"{' '.join(overrides)}`".rstrip(),
    ]
    print("\n".join(lines))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("# Where a step's time goes\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
