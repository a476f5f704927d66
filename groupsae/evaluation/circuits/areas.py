"""Areas under curves of a ratio against the size of the circuit, each on all resamples."""

from typing import Any

import numpy as np
from jaxtyping import Float64

Curve = Float64[np.ndarray, "point *resample"]


def areas(ratios: Curve, sizes: np.ndarray, fractions: np.ndarray) -> dict[str, Any]:
    """Return the areas under a curve of F at circuits of growing size.

    | area | formula |
    |---|---|
    | `area` | trapezoid of F over log N, divided by the range: 1 if F = 1 everywhere |
    | `cpr` | trapezoid of F over the fraction (MIB, arXiv 2504.13151; F = 1: .999 on its grid) |
    | `cmd` | trapezoid of abs(1 - F) over the fraction (MIB); 0 is perfect |
    | `linear` | trapezoid of F over N, divided by the range (the paper, on its grid) |
    """
    log, linear = np.log(sizes), sizes.astype(float)
    wide = np.unique(sizes).size > 1
    return {
        "area": _trapezoid(ratios, log) / (log[-1] - log[0]) if wide else ratios.mean(0),
        "cpr": _trapezoid(ratios, fractions),
        "cmd": _trapezoid(np.abs(1 - ratios), fractions),
        "linear": (
            _trapezoid(ratios, linear) / (linear[-1] - linear[0]) if wide else ratios.mean(0)
        ),
    }


def _trapezoid(values: Curve, x: np.ndarray) -> Any:
    return np.trapezoid(values, x, axis=0)
