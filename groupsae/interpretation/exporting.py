"""Writes the latents of a run as other tools show them, from what was collected about them."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from groupsae.files.atomic import atomic_folder
from groupsae.interop.library import Origin
from groupsae.interpretation import neuronpedia, saedashboard
from groupsae.interpretation.features import LayerFeatures, Names
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.page import labels_of
from groupsae.runtime.commands import command
from groupsae.runtime.errors import UserError
from groupsae.suite.exporting import holds_only
from groupsae.suite.suite import Suite

# by value of `format=`: each has `folder_name` of a layer, `write` into that folder, and
# `recognises`, whether a folder at the top of an export has the format
PAGE_FORMATS: dict[str, ModuleType] = {"saedashboard": saedashboard, "neuronpedia": neuronpedia}


class WrittenPages(NamedTuple):
    """The folder of a layer: its name, the SAE, numbers of latents."""

    folder: str
    group: str
    active: int
    silent: int
    explained: int


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
        if len(decoder) == len(about.nearest):
            # the cosines of the decoder's rows are those that were collected
            cosines = np.einsum("ld,lnd->ln", decoder, decoder[about.nearest])
            if np.allclose(cosines, about.cosines, atol=0.01):
                continue
        raise UserError(
            f"{found.folder} was collected from other weights of {name}: "
            f"{command('interpret', 'overwrite=true', run=run)}"
        )


def export_pages(
    suite: Suite,
    found: Interpretation,
    form: ModuleType,
    names: Names,
    dataset: str,
    target: Path,
    *,
    overwrite: bool,
) -> Iterator[WrittenPages]:
    """Write one folder for each layer, and yield what is in it.

    Raises:
        UserError: the target cannot be written, or a file of the interpretation is damaged.
    """
    labels = labels_of(found)
    with atomic_folder(target, overwrite=overwrite, ours=holds_only(form.recognises)) as temporary:
        for layer in suite.layers:
            group = suite.group_of(layer)
            config = suite.configs[group]
            origin = Origin.of(group, layer, config)
            num_layers = len(config.get("modules") or range(max(suite.layers) + 1))
            about = LayerFeatures(
                found, suite[layer].sae, origin, num_layers, names, dataset, labels
            )
            name = form.folder_name(about)
            (temporary / name).mkdir(parents=True)
            form.write(temporary / name, about)
            counts = (len(about.active), len(about.silent), len(about.explained))
            yield WrittenPages(name, group, *counts)
