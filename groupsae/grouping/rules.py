"""The rules that split n layers into G groups, and the choice of G by AMAD.

To change a rule, edit its function here; to add one, write a function and name it in `RULES`.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist, squareform

from groupsae.grouping.partition import (
    Cosines,
    Distances,
    Partition,
    build_partition,
    mean_cosines,
    validate_distances,
)
from groupsae.runtime.errors import UserError, check_choice

Groups = list[list[int]]


def partition(
    distances: npt.ArrayLike,
    num_groups: int,
    rule: str = "complete",
    cosines: npt.ArrayLike | None = None,
) -> Partition:
    """Return the layers split into exactly num_groups contiguous groups.

    The rules:

    - complete: complete linkage on the distances, as in the paper's text.
    - minmax: the smallest possible largest diameter, ties by AMAD (exact).
    - even: sizes that differ by at most one, the larger groups first.
    - published: complete linkage on Euclidean distances between matrix rows, as in the reference
      code; only this one reproduces the published groups.
    - variance: the smallest possible mean angular variance, sum_g |g| V_g (exact).

    AMAD itself is not among the criteria: its minimum is one giant group and singletons.

    Args:
        distances: [n, n] mean angles between layers, in fractions of pi.
        num_groups: G, from 1 to n.
        rule: one of the names above.
        cosines: [n, n] mean cosines between layers, for the rule variance and the figure V; None:
            the cosines of the mean angles, which differ a little.

    Raises:
        UserError: the distances are no distance matrix, the cosines do not fit them, num_groups is
            out of range, or the rule is unknown.

    >>> partition([[0.0, 0.1, 0.4], [0.1, 0.0, 0.3], [0.4, 0.3, 0.0]], num_groups=2).groups
    [[0, 1], [2]]
    """
    square = validate_distances(distances)
    check_choice("rule", rule, RULES)
    check_num_groups(num_groups, len(square))
    between = mean_cosines(square, cosines)
    groups = RULES[rule](between if rule == "variance" else square, num_groups)
    return build_partition(square, groups, rule, between)


def curve(
    distances: npt.ArrayLike, rule: str, cosines: npt.ArrayLike | None = None
) -> list[Partition]:
    """Return the partitions for G = 1..n; raises UserError as `partition`."""
    square = validate_distances(distances)
    counts = range(1, len(square) + 1)
    return [partition(square, num_groups, rule, cosines) for num_groups in counts]


def choose(
    distances: npt.ArrayLike,
    theta: float = 0.2,
    rule: str = "complete",
    cosines: npt.ArrayLike | None = None,
) -> Partition:
    """Return the partition with the fewest groups whose AMAD is strictly below theta.

    min{G : AMAD(G) < theta} at full precision (arXiv 2410.21508, 3.2, where theta = 0.2). It
    always exists, since n groups of one layer have AMAD 0.

    Raises:
        UserError: theta is not in (0, 1); or as `partition`.

    >>> choose([[0.0, 0.1, 0.6], [0.1, 0.0, 0.5], [0.6, 0.5, 0.0]]).groups
    [[0, 1], [2]]
    """
    check_theta(theta)
    return next(each for each in curve(distances, rule, cosines) if each.amad < theta)


def check_theta(theta: object) -> None:
    """Raise UserError unless 0 < theta < 1."""
    if not isinstance(theta, int | float) or not 0 < theta < 1:
        raise UserError(
            f"theta is {theta!r}: AMAD is an angle in fractions of pi, so theta must lie "
            "between 0 and 1, both excluded. The paper uses groups.theta=0.2."
        )


def check_num_groups(num_groups: object, num_layers: int | None = None) -> None:
    """Raise UserError unless num_groups is an integer from 1 to num_layers (None: no limit)."""
    most = math.inf if num_layers is None else num_layers
    if not isinstance(num_groups, int | np.integer) or not 1 <= num_groups <= most:
        end = "up" if num_layers is None else f"to {num_layers}, the number of layers to group"
        raise UserError(f"num_groups is {num_groups!r}: use an integer from 1 {end}.")


def needs_distances(rule: str) -> bool:
    """Return whether a rule, or the way that a partition was given, uses the distances."""
    return rule not in ("even", "explicit", "per_layer")


def _complete(square: Distances, num_groups: int) -> Groups:
    """Return the groups of complete linkage (arXiv 2410.21508, 3.1).

    On measured matrices the groups are usually contiguous. If they are not, the linkage
    is repeated with merges of neighbours only: the pair of adjacent groups with the smallest
    joint diameter is merged until num_groups are left. This is decided for each G separately, so
    partitions of one matrix are nested unless only some of them needed it.
    """
    n = len(square)
    if num_groups == n:
        return [[layer] for layer in range(n)]
    clusters = {layer: [layer] for layer in range(n)}
    merges = linkage(squareform(square), method="complete")
    # The first n - G merges, counted: a cut by height gives fewer groups where heights tie.
    for step, (a, b) in enumerate(merges[: n - num_groups, :2].astype(int)):
        clusters[n + step] = sorted(clusters.pop(int(a)) + clusters.pop(int(b)))
    groups = sorted(clusters.values())
    if all(group[-1] - group[0] + 1 == len(group) for group in groups):
        return groups
    return _complete_of_neighbours(square, num_groups)


def _complete_of_neighbours(square: Distances, num_groups: int) -> Groups:
    diameters = _diameters_of_runs(square)
    groups = [[layer] for layer in range(len(square))]
    while len(groups) > num_groups:
        joint = [
            diameters[left[0], right[-1]] for left, right in zip(groups, groups[1:], strict=False)
        ]
        at = int(np.argmin(joint))
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return groups


def _published(square: Distances, num_groups: int) -> Groups:
    """Return the groups of the reference code, whose linkage takes matrix rows as points.

    The rows of the lower-triangular matrix (zeros above) are points with Euclidean distances.
    Unlike there, groups that are not contiguous are merged as in `_complete`.
    """
    return _complete(squareform(pdist(np.tril(square))), num_groups)


def _even(square: Distances, num_groups: int) -> Groups:
    """Return runs of n // G layers; the first n % G of them hold one more, as in the paper."""
    return [run.tolist() for run in np.array_split(np.arange(len(square)), num_groups)]


def _minmax(square: Distances, num_groups: int) -> Groups:
    """Return the runs with the smallest largest diameter and, among those, the smallest AMAD.

    Two dynamic programmes of O(G n^2), the first for the largest diameter alone. A single one for
    (largest, sum) is not exact, since a prefix with a larger maximum but a smaller sum may win
    once a later group exceeds both maxima (Pythia-1B at G = 5: AMAD 0.190 against 0.231).
    """
    diameters = _diameters_of_runs(square)
    bound = _best_runs(diameters, num_groups, np.maximum)[0]
    allowed = np.where(diameters <= bound, diameters, np.inf)
    return _best_runs(allowed, num_groups, np.add)[1]


def _variance(cosines: Cosines, num_groups: int) -> Groups:
    """Return the runs with the smallest sum_g |g| V_g, by one dynamic programme of O(G n^2).

    Not degenerate as the minimum of AMAD is: a group counts with its size, and one far layer with
    its distances to all others. |g| V_g is the sum over its pairs of (1 - cosine) / 2, over |g|.
    """
    n = len(cosines)
    sums = np.zeros((n + 1, n + 1))  # of the rows and columns before
    sums[1:, 1:] = ((1 - cosines) / 2).cumsum(0).cumsum(1)
    start, stop = np.arange(n)[:, None], np.arange(n)[None, :] + 1
    inside = sums[stop, stop] - sums[start, stop] - sums[stop, start] + sums[start, start]
    return _best_runs(inside / np.maximum(stop - start, 1), num_groups, np.add)[1]


def _best_runs(costs: Distances, num_groups: int, combine: np.ufunc) -> tuple[float, Groups]:
    """Return the lowest combined cost of num_groups runs that cover all layers, and the runs.

    costs[i, j] is the cost of the run i..j; combine is np.add or np.maximum.
    """
    n = len(costs)
    best = np.full((num_groups + 1, n + 1), np.inf)  # best[g, j]: layers 0..j-1 in g runs
    start = np.zeros((num_groups + 1, n + 1), dtype=int)
    best[0, 0] = 0.0
    for g in range(1, num_groups + 1):
        for j in range(g, n + 1):
            totals = combine(best[g - 1, :j], costs[:j, j - 1])
            start[g, j] = int(totals.argmin())
            best[g, j] = totals[start[g, j]]
    groups: Groups = []
    stop = n
    for g in range(num_groups, 0, -1):
        groups.insert(0, list(range(start[g, stop], stop)))
        stop = int(start[g, stop])
    return float(best[num_groups, n]), groups


def _diameters_of_runs(square: Distances) -> Distances:
    """Return [n, n] with the diameter of the run i..j at (i, j), for i <= j."""
    diameters = square.copy()
    for length in range(2, len(square)):
        for i in range(len(square) - length):
            j = i + length
            diameters[i, j] = max(square[i, j], diameters[i, j - 1], diameters[i + 1, j])
    return diameters


RULES: dict[str, Callable[[Distances, int], Groups]] = {
    "complete": _complete,
    "minmax": _minmax,
    "even": _even,
    "published": _published,
    "variance": _variance,
}
