"""Numbers as people read them."""

from datetime import timedelta


def format_bytes(count: float) -> str:
    """Return a number of bytes with its unit.

    >>> format_bytes(12), format_bytes(56_700), format_bytes(1_638_000_000)
    ('12 B', '56.7 kB', '1.64 GB')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB" if count < 1000 else f"{count / 1000:,.2f} TB"


def format_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss.

    >>> format_seconds(3661.4)
    '1:01:01'
    """
    return str(timedelta(seconds=round(seconds)))
