"""Writes the latents of a run as other tools show them, from what was collected about them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groupsae.files.atomic import atomic_folder
from groupsae.interop.library import Origin
from groupsae.interpretation.features import LayerFeatures, Names, PageFormat
from groupsae.interpretation.files import COLLECTED, Interpretation
from groupsae.interpretation.judged import read_judged
from groupsae.interpretation.neuronpedia import NEURONPEDIA
from groupsae.interpretation.page import labels_of
from groupsae.interpretation.saedashboard import SAEDASHBOARD
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.suite.exporting import holds_only
from groupsae.suite.suite import Suite

PAGE_FORMATS = {each.name: each for each in (SAEDASHBOARD, NEURONPEDIA)}


@dataclass(frozen=True)
class WrittenPages:
    """One folder of an export."""

    folder: str  # its path
    group: str  # the SAE of the layer
    active: int  # latents that fire on the layer
    silent: int  # those that do not
    explained: int  # those with an explanation


def interpretation_of(run: Path) -> Interpretation:
    """Return what was collected about a run; UserError with the command if nothing was."""
    folder = run / "interpretation"
    if not (folder / COLLECTED / "collected.json").exists():
        raise UserError(
            f"{run} has not been interpreted, and the latents' pages are made of what that "
            f"collects: {command('interpret', run=run)}"
        )
    return Interpretation(folder)


def check_interpreted(suite: Suite, found: Interpretation, grouping: str | None) -> None:
    """Raise UserError unless what was collected is about these SAEs."""
    run = found.folder.parent
    missing = [name for name in suite.saes if name not in found.saes]
    if missing:
        more = [] if grouping is None else [f"interpretation.groupings=[{grouping}]"]
        raise UserError(
            f"{found.folder} has nothing about {', '.join(missing)}: "
            f"{command('interpret', *more, run=run)}"
        )
    for name in suite.saes:
        decoder, about = suite.directions(name).cpu().float().numpy(), found.saes[name].directions
        same = len(decoder) == len(about.nearest)
        if same:  # the cosines of the decoder's rows are those that were collected
            cosines = np.einsum("ld,lnd->ln", decoder, decoder[about.nearest])
            same = np.allclose(cosines, about.cosines, atol=0.01)
        if not same:
            raise UserError(
                f"{found.folder} was collected from other weights of {name}: "
                f"{command('interpret', 'overwrite=true', run=run)}"
            )


def export_pages(
    suite: Suite,
    found: Interpretation,
    form: PageFormat,
    names: Names,
    dataset: str,
    target: Path,
    *,
    overwrite: bool,
    advance: Callable[[], object] = lambda: None,
) -> list[WrittenPages]:
    """Write one folder for each layer; `advance` is called after each.

    Raises:
        UserError: the target cannot be written, or a file of the interpretation is damaged.
    """
    written = []
    labels = labels_of(found.explanations, read_judged(found))
    with atomic_folder(target, overwrite=overwrite, ours=holds_only(form.recognises)) as temporary:
        for layer in suite.layers:
            group = suite.group_of(layer)
            config = suite.configs[group]
            origin = Origin.of(group, layer, config)
            num_layers = len(config.get("modules") or range(max(suite.layers) + 1))
            about = LayerFeatures(
                found, suite[layer].sae, origin, num_layers, names, dataset, labels
            )
            folder = temporary / form.folder_name(about)
            folder.mkdir(parents=True)
            form.write(folder, about)
            name = folder.relative_to(temporary).as_posix()
            counts = (len(about.active), len(about.silent), len(about.explained))
            written.append(WrittenPages(name, group, *counts))
            advance()
    return written
