"""What the commands' own values may be: one line each, checked before anything slow starts.

The defaults are in conf/. Arguments of a class (`sae`, `groups`, ...) are checked by the class.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from groupsae.runtime.errors import UserError


class Allowed(NamedTuple):
    """The values that a key may have: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self, meaning: str) -> "Allowed":
        """Return the same values and null."""
        words = f"{self.words}, or null for {meaning}"
        return Allowed(words, lambda v: v is None or self.holds(v))


def at_least(least: int) -> Allowed:
    """Return the integers from `least` on."""
    return Allowed(
        f"an integer of at least {least}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
    )


def between(low: float, high: float) -> Allowed:
    """Return the numbers between two others, which are not among them."""
    return Allowed(
        f"a number between {low:g} and {high:g}",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low < v < high,
    )


def one_of(*names: str) -> Allowed:
    """Return these words."""
    return Allowed(f"{', '.join(names[:-1])} or {names[-1]}", lambda v: v in names)


def some_of(*names: str) -> Allowed:
    """Return the lists of these words that are not empty."""
    return Allowed(
        f"a list of some of {', '.join(names)}",
        lambda v: isinstance(v, Sequence) and bool(v) and set(v) <= set(names),
    )


COUNT, POSITIVE = at_least(1), Allowed("a number above 0", between(0, float("inf")).holds)
TEXT = Allowed("a text", lambda v: isinstance(v, str))
SHARES = Allowed(
    "a list of shares, rising from above 0 to at most 1",
    lambda v: (
        isinstance(v, Sequence)
        and list(v) == sorted(set(v))
        and all(isinstance(x, int | float) and 0 < x <= 1 for x in v)
        and len(v) > 0
    ),
)
SWITCH = Allowed("true or false", lambda v: isinstance(v, bool))
NAMES = Allowed(
    "a name or a list of names",
    lambda v: (
        v not in ("", []) and isinstance(v, Sequence) and all(isinstance(each, str) for each in v)
    ),
)

BOOTSTRAP = {
    "bootstrap.resamples": COUNT,
    "bootstrap.level": between(0, 1),
    "bootstrap.seed": at_least(0),
}
EVALUATION = {  # of the part `heldout`
    "tokens": COUNT.or_null("as many as stream.heldout_tokens"),
    "exclude_special_tokens": SWITCH.or_null("what the run did in training"),
    "together": SWITCH,
    "similarity_tokens": at_least(0),
    **BOOTSTRAP,
}
PARTS = {  # of an evaluation
    "heldout": EVALUATION,
    "circuits": {
        "tasks": NAMES,
        "groupings": NAMES.or_null("the chosen one and per_layer"),
        "train_pairs": at_least(2),
        "test_pairs": at_least(2),
        "attribution": one_of("ig_inputs", "ig", "attribution"),
        "steps": COUNT,
        "select": one_of("global", "per_layer"),
        "ablation": one_of("patch", "mean", "zero"),
        "errors": some_of("keep", "none"),
        "curves": some_of("faithfulness", "completeness", "random"),
        "fractions": SHARES,
        "completeness_fractions": SHARES.or_null("fractions"),
        "last_layer": SWITCH,
        "single_layers": SWITCH,
        "gate": Allowed(
            "a number from 0 to 1", lambda v: isinstance(v, int | float) and 0 <= v <= 1
        ),
        "shown": COUNT,
        "batch_size": COUNT,
        "seed": at_least(0),
        **BOOTSTRAP,
    },
    "probes": {
        "labels": NAMES,
        "k": Allowed(
            "a list of integers of at least 1, such as [1,5]",
            lambda v: isinstance(v, Sequence) and len(v) > 0 and all(map(COUNT.holds, v)),
        ),
        "examples": at_least(10),
        "seed": at_least(0),
        **BOOTSTRAP,
    },
    "harness": {
        "tasks": NAMES,
        "folder": TEXT.or_null("none"),
        "limit": COUNT.or_null("all documents"),
        "num_fewshot": at_least(0).or_null("as many as a task has"),
        "batch_size": COUNT,
        "layers": SWITCH,
        "seed": at_least(0),
        **BOOTSTRAP,
    },
}
INTERPRETATION = {
    "explain_tokens": COUNT.or_null("as many as score_tokens"),
    "score_tokens": COUNT.or_null("all held-out tokens, up to a million"),
    "top": COUNT,
    "sample": at_least(10),
    "across": COUNT,
    "latents": COUNT,
    "seed": at_least(0),
    "judge": one_of("rules", "endpoint", "hf"),
    "judged_latents": COUNT,
    "delphi_compat": SWITCH,
    "endpoint.url": TEXT,
    "endpoint.key_variable": TEXT.or_null("no key"),
    "endpoint.body": Allowed("a table, such as {top_p: 1}", lambda v: isinstance(v, Mapping)),
    "endpoint.parallel": COUNT,
    "endpoint.timeout": POSITIVE,
    "endpoint.retries": at_least(0),
    "endpoint.answer_tokens": COUNT,
    "endpoint.most_tokens": COUNT,
}
TRAINING = {
    "tokens": COUNT,
    "dead_after": COUNT,
    "log_every": COUNT,
    "eval_every": COUNT,
    "checkpoint_every": COUNT,
    "seed": at_least(0),
    "calibration.tokens": COUNT,
    "calibration.centring": one_of("auto", "none", "mean"),
    "stream.context": COUNT,
    "stream.prepend_bos": SWITCH,
    "stream.exclude_special_tokens": SWITCH,
    "stream.heldout_fraction": between(0, 0.5),
    "stream.calibration_fraction": between(0, 0.5),
    "stream.max_tokens": COUNT.or_null("as many as the training budget needs"),
    "stream.layers_per_token": COUNT,
    "stream.blocks_per_step": COUNT,
    "stream.blocks_per_forward": COUNT,
    "stream.heldout_tokens": COUNT,
    "stream.max_norm_ratio": Allowed(
        "a number above 1, such as 10", between(1, float("inf")).holds
    ).or_null("no limit"),
    "stream.num_workers": at_least(0),
    "optim.base_lr": POSITIVE,
    "optim.clip_norm": POSITIVE,
    "data.cache": Allowed(
        "a folder, there or not yet, or null to store no activations",
        lambda v: v is None or (isinstance(v, str) and v != "" and not Path(v).is_file()),
    ),
    "data.cache_dtype": one_of("bfloat16", "float16", "float32"),
    "evaluate": SWITCH,
    "interpret": SWITCH,
    "dry_run": SWITCH,
    "overwrite": SWITCH,
}


# paths and names: texts, also where one reads as a number (model.revision=143000)
TEXTS = (
    "output", "resume", "run", "saes", "name", "hub", "grouping", "only", "cache", "init",
    "model.name", "model.revision", "model.blocks_path", "model.submodule",
    "model.load.subfolder", "data.path", "data.text_column", "data.name", "data.config",
    "data.split", "data.revision", "data.column", "data.cache", "logger.wandb.project",
    "logger.wandb.entity", "neuronpedia.model", "neuronpedia.set", "neuronpedia.release",
    "neuronpedia.creator_id", "neuronpedia.creator_name", "evaluation.probes.labels",
    "evaluation.harness.tasks", "evaluation.harness.folder", "evaluation.circuits.tasks",
    "evaluation.circuits.groupings",
)  # fmt: skip
# those that may be lists of texts
LISTS = (
    "run", "only", "evaluation.probes.labels", "evaluation.harness.tasks",
    "evaluation.circuits.tasks", "evaluation.circuits.groupings",
)  # fmt: skip
# what a run finds by its name or path and checks by its content, so that it may have moved
PLACES = ("model.name", "data.path", "data.name")


def names_of(value: Any) -> list[str] | None:
    """Return one of `LISTS` as a list, also where it is a single text; None stays None."""
    return [value] if isinstance(value, str) else None if value is None else list(value)


def settle_texts(cfg: DictConfig) -> None:
    """Check `TEXTS` in a configuration that was just composed, and write out `~` in paths.

    The command line's are texts already; here are those of a user's yaml files.

    Raises:
        UserError: one is a number, true or false.
    """
    for key in TEXTS:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, os.path.expanduser(value))
        if isinstance(value, bool | int | float):
            raise UserError(
                f"{key} is {value!r}, which is no text: put it in quotes in your yaml file, or "
                f"give {key}=<value> on the command line."
            )


def check_values(cfg: DictConfig, allowed: Mapping[str, Allowed], where: str = "") -> None:
    """Check every key of a table; `where` is the dotted name of the node, with a dot at its end.

    Raises:
        UserError: a value has no default and is not given, or is not allowed.
    """
    for key, values in allowed.items():
        value = OmegaConf.select(cfg, key)
        if not values.holds(value):
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            raise UserError(f"{where}{key} is {value!r}; it must be {values.words}.")


def evaluation_parts(options: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the parts that an evaluation chooses, each with its values, by name.

    Those of `heldout` are directly in `evaluation`, those of another part in `evaluation.<part>`.
    """
    values: Any = OmegaConf.to_container(options, resolve=True)
    others = {
        name: dict(node)
        for name, node in values.items()
        if isinstance(node, Mapping) and "_target_" in node
    }
    for name, node in others.items():
        lists = (key for key in node if f"evaluation.{name}.{key}" in LISTS)
        node |= {key: names_of(node[key]) for key in lists}
    heldout = {key: value for key, value in values.items() if key not in others}
    return ({"heldout": heldout} if heldout else {}) | others


def check_evaluation(options: DictConfig) -> None:
    """Check `evaluation` of a configuration.

    Raises:
        UserError: as `check_values`.
    """
    for name in evaluation_parts(options):
        node, where = (options, "") if name == "heldout" else (options[name], f"{name}.")
        check_values(node, PARTS[name], f"evaluation.{where}")


def check_training(cfg: DictConfig) -> None:
    """Check the configuration of a run of `groupsae.train`.

    Raises:
        UserError: as `check_values`, or the trainer is asked for what the SAEs' steps cannot do.
    """
    # (the folders of loggers and callbacks follow from the rest, so they cannot be read yet)
    rest = [str(key) for key in cfg if key not in ("logger", "callbacks")]
    missing = sorted(OmegaConf.missing_keys(OmegaConf.masked_copy(cfg, rest)))
    if missing:
        raise UserError(f"{missing[0]} has no default: give {missing[0]}=<value>.")
    check_values(cfg, TRAINING)
    if cfg.evaluate:
        check_evaluation(cfg.evaluation)
    if cfg.interpret:
        check_values(cfg.interpretation, INTERPRETATION, "interpretation.")
    precision = cfg.trainer.get("precision", "32-true")
    if precision != "32-true":
        raise UserError(
            f"trainer.precision is {precision!r}; the SAEs train in 32-true. The language model's "
            "own precision is model.dtype=bfloat16."
        )
    batches = cfg.trainer.get("accumulate_grad_batches", 1)
    if batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {batches}; a step of the SAEs is one batch. "
            "Raise stream.blocks_per_step instead: stream.blocks_per_forward bounds the language "
            "model's memory."
        )
