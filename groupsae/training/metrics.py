"""What is logged of a fit: running means of the steps, and validations."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from groupsae.training.nonfinite import RunningStats, check_finite, check_skips


def steps_of(module: Any) -> int:
    """Return the steps of the complete training."""
    return int(module.trainer.datamodule.num_steps)


def is_logging_step(module: Any) -> bool:
    """Return whether the step that was just taken is one of those that are logged."""
    return bool(module.global_step % module.trainer.log_every_n_steps == 0)


def log_training(module: Any, stats: Mapping[str, RunningStats], serving: Collection[str]) -> None:
    """Log the figures of training steps; the progress bar shows the mean fvu of `serving`.

    Raises:
        UserError: a value is not finite, or a group left out too many steps in a row.
    """
    check_finite(module, stats)
    check_skips(module, stats)
    for name, stat in stats.items():
        for figure, value in stat.values.items():
            module.log(f"train/{figure}/{name}", value, rank_zero_only=True)
    shown = [stats[name].values for name in serving]
    if all("fvu" in values for values in shown):  # not where all steps were left out
        module.shown["fvu"] = mean_of(values["fvu"] for values in shown)


def log_validation(
    module: Any, results: Mapping[str, dict[str, Any]], serving: Mapping[int, str]
) -> None:
    """Log fvu and l0 per layer; per group their means and the share of unfired latents.

    The figures of a layer are those of the group that `serving` names for it.
    """
    for name, result in results.items():
        for figure in ("fvu", "l0", "unfired"):
            module.log(f"val/{figure}/{name}", result[figure], rank_zero_only=True)
    served = {x: results[name]["per_layer"][x] for x, name in sorted(serving.items())}
    for layer, result in served.items():
        for figure in ("fvu", "l0"):
            module.log(f"val/{figure}/layer.{layer}", result[figure], rank_zero_only=True)
    mean = mean_of(result["fvu"] for result in served.values())
    module.log("val/fvu/mean", mean, rank_zero_only=True)
    module.shown["val/fvu/mean"] = mean


def mean_of(values: Iterable[float]) -> float:
    """Return the mean."""
    listed = list(values)
    return sum(listed) / len(listed)
