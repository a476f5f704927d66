"""Are the options of an evaluation what they may be: told before any work starts."""

from collections.abc import Mapping
from typing import Any

from groupsae.runtime.errors import UserError


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError if a value of conf/evaluation is not allowed.

    How many tokens the text has is not known here.

    Args:
        options: plain values, `bootstrap` among them a mapping.
    """
    tokens = options["tokens"]
    if tokens is not None and not _whole(tokens, 1):
        raise UserError(
            f"evaluation.tokens is {tokens!r}; it must be a whole number of at least 1, or null "
            "for as many as stream.heldout_tokens."
        )
    special, together = options["exclude_special_tokens"], options["together"]
    if special is not None and not isinstance(special, bool):
        raise UserError(
            f"evaluation.exclude_special_tokens is {special!r}; it must be true, false, or null "
            "for what the run did in training."
        )
    if not isinstance(together, bool):
        raise UserError(f"evaluation.together is {together!r}; it must be true or false.")
    similarity, bootstrap = options["similarity_tokens"], options["bootstrap"]
    if not _whole(similarity, 0):
        raise UserError(
            f"evaluation.similarity_tokens is {similarity!r}; it must be a whole number of at "
            "least 0."
        )
    if not isinstance(bootstrap, Mapping) or set(bootstrap) != {"resamples", "level", "seed"}:
        raise UserError(
            f"evaluation.bootstrap is {bootstrap!r}; it must have resamples, level and seed, "
            "such as {resamples: 1000, level: 0.95, seed: 0}."
        )
    for name, least in (("resamples", 1), ("seed", 0)):
        if not _whole(bootstrap[name], least):
            raise UserError(
                f"evaluation.bootstrap.{name} is {bootstrap[name]!r}; it must be a whole number "
                f"of at least {least}."
            )
    level = bootstrap["level"]
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise UserError(
            f"evaluation.bootstrap.level is {level!r}; it must lie between 0 and 1, such as 0.95."
        )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
