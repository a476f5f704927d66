"""A latent's page in a notebook."""

from html import escape
from operator import index
from pathlib import Path
from typing import SupportsIndex

from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.page import one_latent
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.suite.suite import Suite


class Dashboard:
    """The page of one latent, which a notebook shows inline.

    Attributes:
        html: the complete page; it needs no network.
    """

    def __init__(self, html: str, title: str) -> None:
        self.html, self.title = html, title

    def save(self, path: str | Path) -> Path:
        """Write the page to a file; return its path."""
        Path(path).write_text(self.html, encoding="utf-8")
        return Path(path)

    def __repr__(self) -> str:
        """Return which latent it shows."""
        return f"Dashboard({self.title})"

    def _repr_html_(self) -> str:
        """Return a frame with the page: neither can change the other."""
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" title="{self.title}" '
            'style="width: 100%; height: 48rem; border: 1px solid #ccc; border-radius: 6px">'
            "</iframe>"
        )


def dashboard(
    suite: Suite,
    layer: SupportsIndex,
    latent: SupportsIndex,
    interpretation: str | Path | None = None,
) -> Dashboard:
    """Return a latent's page: where it fires at each layer, what explains it, its neighbours.

    Args:
        suite: the SAEs of a run that was interpreted.
        layer: the layer that the page opens at.
        latent: number of the latent.
        interpretation: folder `interpretation` of the run; None: that of the suite's run.

    Raises:
        UserError: the layer has no SAE, it has no such latent, or the SAE was not interpreted.

    >>> groupsae.dashboard(suite, layer=5, latent=17)
    Traceback (most recent call last):
    groupsae.runtime.errors.UserError: this suite has no run folder: give interpretation=<folder>.
    """
    name, number = suite.group_of(index(layer)), index(latent)
    d_sae = suite.saes[name].d_sae
    if not 0 <= number < d_sae:
        raise UserError(f"latent {number} does not exist: {name} has latents 0 to {d_sae - 1}.")
    if interpretation is None and suite.run is None:
        raise UserError("this suite has no run folder: give interpretation=<folder>.")
    folder = Path(interpretation) if interpretation else Path(suite.run or "") / "interpretation"
    found = Interpretation.of(folder)
    if name not in found.saes:
        again = command("interpret", run=folder.parent)
        raise UserError(f"{name} was not interpreted, so there is no page of its latents: {again}")
    html = one_latent(found, name, number, index(layer))
    return Dashboard(html, f"{name}, latent {number}")
