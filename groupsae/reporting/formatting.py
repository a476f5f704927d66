"""How numbers, layers and commands are written for the reader."""

from collections.abc import Sequence
from typing import Any

from groupsae.reporting.load import Interval, interval

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
TIGHT = "\N{NO-BREAK SPACE}"  # between a number and its unit
DIGITS = {"fvu": 4, "delta_ce": 4, "delta_ce_percent": 2, "kl": 4, "ce": 4, "ce_score": 4}
NAMES = {"fvu": "FVU", "delta_ce": "ΔCE"}
METRICS = tuple(NAMES)  # what curves, comparisons and spreads are about
PARTS = {
    "activations": "language model", "distances": "layer distances", "saes": "SAEs",
    "store": "filling the store",
}  # fmt: skip
UNIT = {"fvu": "", "delta_ce": f"{TIGHT}nats"}


def number(value: float | int | None, digits: int = 4) -> str:
    """Return a number with fixed decimals and a real minus sign; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as per cent."""
    return NONE if share is None else f"{number(100 * share, digits)}{TIGHT}%"


def within(stored: Any, metric: str) -> str:
    """Return a value and its interval, such as `0.1862 [0.1820, 0.1904]`."""
    found = stored if isinstance(stored, Interval) else interval(stored)
    if found is None:
        return NONE
    digits = DIGITS.get(metric, 4)
    text = number(found.value, digits)
    if found.low is not None and found.high is not None:
        text += f" [{number(found.low, digits)}, {number(found.high, digits)}]"
    return text


def span(layers: Sequence[int]) -> str:
    """Return `3` for one layer and `3–10` for a run of them."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}{NONE}{layers[-1]}"


def spans(groups: Sequence[Sequence[int]]) -> str:
    """Return the groups of a partition, such as `0–2 · 3–10`."""
    return f"{TIGHT}· ".join(span(group) for group in groups)


def plural(count: int, noun: str) -> str:
    """Return `1 group` or `2 groups`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def flops(count: float | None) -> str:
    """Return a count of FLOPs with a readable prefix."""
    if count is None:
        return NONE
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= size:
            return f"{count / size:.3g} {prefix}FLOP"
    return f"{count / 1e9:.3g} GFLOP"


def duration(seconds: float | None) -> str:
    """Return seconds as `75 s`, `12 min 30 s` or `3 h 5 min`."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.{seconds < 10:d}f}{TIGHT}s"
    whole = round(seconds)
    if whole < 5400:
        return f"{whole // 60}{TIGHT}min {whole % 60}{TIGHT}s"
    return f"{whole // 3600}{TIGHT}h {whole % 3600 // 60}{TIGHT}min"
