"""Figures of the latents: in which layers of their group they fire, and how often."""

import numpy as np
from jaxtyping import Float
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from groupsae.evaluation.latents import layer_profile
from groupsae.reporting.figures import label_of
from groupsae.reporting.load import RunFiles
from groupsae.reporting.style import COLOURS, layer_ticks, legend_below, new_axes

COLUMNS = 4  # panels in a row


def layer_profiles(run: RunFiles) -> Figure | None:
    """Return an image per shared SAE: the share of each latent's firings in each layer.

    Latents are sorted by their mean layer; those that never fired are left out (paper, figure
    "feature distribution").

    Returns:
        None where no SAE is shared, or the counts were not saved.
    """
    panels = [(name, *profile) for name in run.saes if (profile := _profile(run, name))]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(max(4.2, 2.35 * columns + 0.9), 3.2 * rows), layout="constrained", dpi=150
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes, (name, layers, shares) in zip(grid.flat, panels, strict=False):
        image = axes.imshow(
            shares,
            aspect="auto",
            cmap="viridis",
            norm=PowerNorm(0.5, 0, 1),  # even shares of a large group are small, and must be seen
            interpolation="nearest",
        )
        ticks = layer_ticks(layers)[:: 2 if len(layers) > 8 else 1]
        axes.set_xticks([layers.index(x) for x in ticks], [str(x) for x in ticks])
        axes.set(title=label_of(name), xlabel="layer")
        axes.title.set_fontsize(10)
        axes.locator_params(axis="y", nbins=5)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("latent, by mean layer")
    assert image is not None
    figure.colorbar(image, ax=grid, label="share of the latent's firings", shrink=0.8)
    return figure


def _profile(
    run: RunFiles, name: str
) -> tuple[list[int], Float[np.ndarray, "latent layer"]] | None:
    stored = run.latents(name)
    if stored is None or len(stored["layers"]) < 2:
        return None
    layers = [int(x) for x in stored["layers"]]
    tokens = np.broadcast_to(stored["tokens"].astype(np.int64), len(layers))
    profile = layer_profile(stored["fired"].astype(np.int64), tokens, layers)
    order = np.argsort(profile.mean_layers, kind="stable")
    shares = profile.shares[order[profile.alive[order]]]
    return (layers, shares) if len(shares) else None


def density(run: RunFiles) -> Figure | None:
    """Return the histogram of how often latents fire, one line per SAE.

    Returns:
        None where the run was not evaluated.
    """
    saes = {s["name"]: s for s in (run.evaluation or {}).get("saes", [])}
    found = [(name, saes[name]["density_histogram"]) for name in run.saes if name in saes]
    if not found:
        return None
    figure, axes = new_axes()
    for i, (name, histogram) in enumerate(found):
        counts = np.asarray(histogram["counts"], dtype=np.float64)
        total = max(1.0, counts.sum() + histogram["never"])
        never = f", {histogram['never']} never" if histogram["never"] else ""
        axes.stairs(
            counts / total,
            np.asarray(histogram["edges"], dtype=np.float64),
            color=COLOURS[i % len(COLOURS)],
            ls=("-", "--", ":")[i // len(COLOURS) % 3],
            lw=1.6,
            label=label_of(name) + never,
        )
    axes.axvline(-1, color="0.4", lw=1, ls=":")
    axes.text(-1, 0.99, " dense", transform=axes.get_xaxis_transform(), va="top", color="0.3")
    axes.set(
        xlabel="share of tokens on which a latent fires",
        ylabel="share of the SAE's latents",
        ylim=(0, None),
        title="How often latents fire",
    )
    axes.xaxis.set_major_formatter("$10^{{{x:g}}}$")
    axes.xaxis.set_major_locator(MultipleLocator(1))
    legend_below(figure)
    return figure
