"""How numbers, layers and names are written for the reader."""

from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
TIGHT = "\N{NO-BREAK SPACE}"  # between a number and its unit
# of curves and comparisons; lower is better; the last one of encoders
METRICS = {"fvu": "FVU", "delta_ce": "ΔCE", "embedding_loss": "1 − cosine"}
RULE_NAMES = {
    "complete": "complete linkage",
    "minmax": "min-max",
    "even": "evenly spaced",
    "published": "published rule",
    "variance": "least variance",
    "explicit": "groups by hand",
}


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with fixed decimals and a real minus sign; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as per cent."""
    return NONE if share is None else f"{number(100 * share, digits)}{TIGHT}%"


def span(layers: Sequence[int]) -> str:
    """Return `3` for one layer and `3–10` for several adjacent ones."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}{NONE}{layers[-1]}"


def spans(groups: Sequence[Sequence[int]]) -> str:
    """Return the groups of a partition, such as `0–2 · 3–10`."""
    return f"{TIGHT}· ".join(map(span, groups))


def plural(count: int, noun: str) -> str:
    """Return `1 group` or `2 groups`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def flops(count: float) -> str:
    """Return a number of FLOPs with a readable prefix."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= size:
            return f"{count / size:.3g} {prefix}FLOP"
    return f"{count / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """Return seconds as `75 s`, `12 min 30 s` or `3 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.{seconds < 10:d}f}{TIGHT}s"
    rounded = round(seconds)
    if rounded < 5400:
        return f"{rounded // 60}{TIGHT}min {rounded % 60}{TIGHT}s"
    return f"{rounded // 3600}{TIGHT}h {rounded % 3600 // 60}{TIGHT}min"
