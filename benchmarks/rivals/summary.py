"""From the seconds of all steps to a table: medians of block medians, ratios round by round."""

from statistics import median
from typing import NamedTuple

Blocks = list[list[float]]  # seconds, [round][step]


class Row(NamedTuple):
    """One contender in one part.

    Attributes:
        ms: median over rounds of the median step of each.
        speed: how many times as fast as the base: the median over rounds of the base's median
            step in a round by the contender's in the same one.
        low: of the rounds' ratios.
        high: of the rounds' ratios.
    """

    ms: float
    speed: float
    low: float
    high: float


def summed_up(blocks: dict[str, Blocks], base: str) -> dict[str, Row]:
    """Return contender -> row.

    Args:
        blocks: contender -> its blocks; all have the same number of rounds.
        base: the contender that all are compared with.
    """
    medians = {name: [median(block) for block in rounds] for name, rounds in blocks.items()}
    rows = {}
    for name, mine in medians.items():
        ratios = [b / m for b, m in zip(medians[base], mine, strict=True)]
        rows[name] = Row(1000 * median(mine), median(ratios), min(ratios), max(ratios))
    return rows


def side_by_side(plain: dict[str, Row], tuned: dict[str, Row], unit: str, tokens: int) -> str:
    """Return a Markdown table of one part with its two settings of the allocator.

    Args:
        plain: contender -> row; may be empty, as may `tuned`.
        tuned: the same, where the allocator keeps what is freed.
        unit: `ms` of a step, or `tokens/s`.
        tokens: of a step.
    """
    lines = [
        f"| | {unit} | times sparsify's speed | {unit}, tuned malloc | times sparsify's speed |",
        "|---|---|---|---|---|",
    ]
    for name in {**plain, **tuned}:
        cells = [x for rows in (plain, tuned) for x in _cells(rows.get(name), unit, tokens)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: Row | None, unit: str, tokens: int) -> tuple[str, str]:
    if row is None:
        return "", ""
    value = row.ms if unit == "ms" else 1000 * tokens / row.ms
    digits = 1 if value < 100 else 0
    return f"{value:,.{digits}f}", f"{row.speed:.2f} [{row.low:.2f}, {row.high:.2f}]"
