"""How the layers of a group share a latent: who fires, when together, and on what.

Notation: p_l is the share of tokens on which the latent fires at layer l, n the number of layers;
all layers see the same tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

COVERED, GAP = 0.9, 0.1
PERMUTATIONS = 199
SAME, DIFFERENT, APART = 0.8, 0.5, 0.25  # tau, tau, bits
LEAST_GAIN = 0.1  # of F1 over the null, for a transfer to be defined


def shares(rates: Float[np.ndarray, " layer"]) -> dict[str, Any]:
    """Return where a latent lives among the layers of its group.

    - shares = p_l / sum p; effective_layers = exp(entropy of the shares), 1 to n;
    - range: first and last layer of the shortest run with 90 % of the shares, as places;
    - gap: a layer inside that run has less than a tenth of 1 / n.
    """
    total = rates.sum()
    if total <= 0:
        nothing = [0.0] * len(rates)
        return {"shares": nothing, "effective_layers": None, "range": None, "gap": False}
    share = rates / total
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum()
    runs = [
        (last - first, first, last)
        for first in range(len(share))
        for last in range(first, len(share))
        if share[first : last + 1].sum() >= COVERED - 1e-12
    ]
    _, first, last = min(runs)
    return {
        "shares": share.tolist(),
        "effective_layers": float(np.exp(entropy)),
        "range": [first, last],
        "gap": bool((share[first : last + 1] < GAP / len(share)).any()),
    }


def cofiring(
    positions: Sequence[Int[np.ndarray, " _"]], tokens: int
) -> tuple[Float[np.ndarray, "layer layer"], Float[np.ndarray, "layer layer"], dict[str, float]]:
    """Return how the layers fire together: for pairs (a, b), and in all.

    - Jaccard |A and B| / |A or B|, and containment |A and B| / |A|;
    - persistence = mean over tokens on which any layer fires of (layers firing) / n;
    - independent = the same if layers fired independently: sum p / (n (1 - prod (1 - p))).

    `positions` are where each layer fires, among `tokens`.
    """
    anywhere, owner = np.unique(np.concatenate(positions), return_inverse=True)
    sizes, n = np.array([len(p) for p in positions]), len(positions)
    fires = np.zeros((n, len(anywhere)), np.float32)
    fires[np.repeat(np.arange(n), sizes), owner] = 1
    both = (fires @ fires.T).astype(np.float64)
    either, rates = sizes[:, None] + sizes - both, sizes / tokens
    expected = n * (1 - np.prod(1 - rates))
    together = {
        "persistence": float(sizes.sum() / max(n * len(anywhere), 1)),
        "independent": float(rates.sum() / expected) if expected > 0 else 0.0,
    }
    return both / np.maximum(either, 1), both / np.maximum(sizes[:, None], 1), together


def divergence(a: Int[np.ndarray, " a"], b: Int[np.ndarray, " b"], size: int) -> float:
    """Return the Jensen-Shannon divergence of two samples of tokens, in bits, 0 to 1."""
    p, q = (np.bincount(x, minlength=size) / max(len(x), 1) for x in (a, b))
    middle = (p + q) / 2

    def kl(x: np.ndarray) -> float:
        held = x > 0
        return float((x[held] * np.log2(x[held] / middle[held])).sum())

    return (kl(p) + kl(q)) / 2


def drift(
    a: tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]],
    b: tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]],
    size: int,
    draws: np.random.Generator,
) -> tuple[float, float | None]:
    """Return how far the tokens that a latent fires on at two layers differ, and its p-value.

    Each side is (tokens, documents) of its firings, strongest first, of which the first m count, m
    being the smaller number; tokens are numbers below `size`. The divergence of their tokens, less
    the mean divergence of halves within a side: two samples of one distribution differ as well.
    p is the share of divergences at least as large when the layers of firings are swapped at
    random within documents; None where the drift is below 0.25 bit, which is not worth testing.
    """
    m = min(len(a[0]), len(b[0]))
    (ta, da), (tb, db) = ([each[:m] for each in side] for side in (a, b))
    found = divergence(ta, tb, size)
    excess = found - float(np.mean([_halves(side, size, draws) for side in (ta, tb)]))
    if excess <= APART:
        return excess, None
    documents = np.concatenate([da, db])
    order = np.argsort(documents, kind="stable")
    side, tokens, documents = order >= m, np.concatenate([ta, tb])[order], documents[order]
    larger = 0
    for _ in range(PERMUTATIONS):
        # a random order within each document, with the same number of each side in it
        shuffled = side[np.argsort(documents + draws.random(2 * m))]
        larger += divergence(tokens[~shuffled], tokens[shuffled], size) >= found
    return excess, (larger + 1) / (PERMUTATIONS + 1)


def _halves(tokens: np.ndarray, size: int, draws: np.random.Generator) -> float:
    shuffled = draws.permutation(tokens)
    middle = len(tokens) // 2
    return divergence(shuffled[:middle], shuffled[middle:], size) if middle else 0.0


def transfer(
    row: Mapping[str, Any],
    layers: Sequence[int],
    sources: Sequence[str | int] | None = None,
) -> Float[np.ndarray, "source layer"]:
    """Return tau(a -> b) = (S(a -> b) - S0(b)) / (S(b -> b) - S0(b)) of one latent.

    S is F1 on the score text of the explanation made from layer a, at layer b; S0 that of another
    latent's explanation. 1: the explanation holds at b as well as b's own. Not a number where b's
    own explanation is less than 0.1 above S0, or a layer has too few firings.

    Args:
        row: of `explanations.json`.
        layers: the layers of the group, b.
        sources: where explanations are made, a: layers, or "all"; None: `layers`.
    """
    places, made = list(map(str, layers)), list(map(str, sources or layers))
    tau = np.full((len(made), len(places)), np.nan)
    for j, b in enumerate(places):
        if b not in row["layers"]:
            continue
        null = row["layers"][b]["scores"]["null_f1"]
        own = row["transfer"][b][b] - null
        for i, a in enumerate(made):
            if own >= LEAST_GAIN and a in row["transfer"]:
                tau[i, j] = (row["transfer"][a][b] - null) / own
    return tau


def labels_needed(row: Mapping[str, Any], layers: Sequence[int]) -> int | None:
    """Return how many explanations a latent needs, so that one carries over to every layer.

    The explanations are those made from each layer and from all layers together; one carries over
    to layer b if tau(a -> b) >= 0.8. None if no layer's own explanation is above its null: then
    there is nothing to carry over.
    """
    tau = transfer(row, layers, [*layers, "all"])
    held = tau[:, np.isfinite(tau).any(0)] >= SAME
    if not held.shape[1]:
        return None
    # sets of covered layers, of ever more explanations; one of them must cover the first gap
    reached, count = {frozenset[int]()}, 0
    while frozenset(range(held.shape[1])) not in reached:
        gaps = {done: min(set(range(held.shape[1])) - done) for done in reached}
        reached = {
            done | frozenset(np.flatnonzero(covers).tolist())
            for done, gap in gaps.items()
            for covers in held
            if covers[gap]
        }
        count += 1
    return count


def kind_of(
    tau: tuple[float, float],
    contained: tuple[float, float],
    rates: tuple[float, float],
    drifted: float,
    q: float | None,
) -> str:
    """Return how a latent at layer b relates to itself at layer a.

    - `narrower` (at b): four fifths of its firings at b are firings at a, and it fires at most two
      thirds as often; `broader`: the other way round;
    - `same`: explanations carry over both ways, tau >= 0.8;
    - `different`: it drifts by more than 0.25 bit, q < 0.05, and tau < 0.5 both ways;
    - `unclear`: none of these.

    Args:
        tau: (a -> b, b -> a); not a number counts as neither high nor low.
        contained: shares of the firings at a that are firings at b, and of those at b.
        rates: firing rates at a and b.
        drifted: drift in bits.
        q: its q-value; None: not tested.
    """
    a, b = rates
    if contained[1] >= SAME and b <= a * 2 / 3:
        return "narrower"
    if contained[0] >= SAME and a <= b * 2 / 3:
        return "broader"
    if min(tau) >= SAME:
        return "same"
    if drifted > APART and q is not None and q < 0.05 and max(tau) < DIFFERENT:
        return "different"
    return "unclear"


KINDS = ("same", "narrows", "different", "unclear", "one_layer")  # of a latent of several layers
BADGES = {
    "different": "means different things",
    "narrows": "narrows across layers",
    "same": "same at all layers",
}


def kind_of_latent(kinds: Sequence[str]) -> str:
    """Return one of `KINDS` for the kinds of a latent's pairs of layers.

    `different` if a pair is, else `narrows` if a pair is narrower or broader, `same` if all are,
    `one_layer` if there is none: the latent fires often enough on one layer at most.
    """
    found = set(kinds)
    if not found:
        return "one_layer"
    if "different" in found:
        return "different"
    if found & {"narrower", "broader"}:
        return "narrows"
    return "same" if found == {"same"} else "unclear"


def badge_of(kinds: Sequence[str]) -> str:
    """Return the words that a latent's page shows for the kinds of its pairs of layers."""
    return BADGES.get(kind_of_latent(kinds), "")
