"""Writes the SAEs of a suite as folders of another library, and proves that they are the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.files.atomic import atomic_folder
from groupsae.interop.formats import check_holds
from groupsae.interop.library import Library, Origin, fold_norm_factor
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.suite.suite import Suite

ROWS = 64
TOLERANCE = 1e-5  # of the largest activation; float32 rounds to 6e-8, and d_model of them add up
SIZES = [3.0 * 10**power for power in range(10)]  # of test activations, in scaled units
TIES = 0.05  # share of rows whose latents may differ because two activations are almost equal


@dataclass(frozen=True)
class Written:
    """One folder of an export."""

    folder: str  # its name
    group: str  # the SAE in it
    difference: float  # largest between its output and ours, as a share of the largest value
    ties: int  # rows left out of that, where rounding decides which latents are active


def export_suite(
    suite: Suite, library: Library, target: Path, *, overwrite: bool
) -> list[Written]:
    """Write one folder for each layer, each read back and compared with the suite.

    Returns:
        The folders, by layer.

    Raises:
        UserError: the format cannot hold an SAE, the target cannot be written, or an SAE that
            was read back computes something else.
    """
    for name, sae in suite.saes.items():
        check_holds(library, sae, name)
    groups = {layer: suite.group_of(layer) for layer in suite.layers}
    origins = [Origin.of(name, layer, suite.configs[name]) for layer, name in groups.items()]
    names = [library.folder_name(origin) for origin in origins]  # may raise: before any writing
    written = []
    with atomic_folder(
        target, overwrite=overwrite, ours=holds_only(library.recognises)
    ) as temporary:
        for origin, name in zip(origins, names, strict=True):
            folder, sae = temporary / name, suite[origin.layer].sae
            folder.mkdir(parents=True)
            library.write(folder, fold_norm_factor(sae, origin.norm_factor), origin)
            difference, ties = compare(sae, origin.norm_factor, library.read(folder).sae)
            if not difference <= TOLERANCE or ties > TIES * ROWS:
                raise UserError(
                    f"{target / name} would not compute the same as {origin.group}: the outputs "
                    f"differ by {difference:.1e} of the largest value ({TOLERANCE:.0e} is "
                    f"allowed), and {ties} of {ROWS} rows have other active latents. Nothing was "
                    "written; please report this."
                )
            written.append(Written(name, origin.group, difference, ties))
    return written


def holds_only(recognises: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """Return the test whether every folder in a folder is recognised."""
    return lambda folder: all(recognises(child) for child in folder.iterdir())


@torch.no_grad()
def compare(sae: SAE, factor: float, other: SAE) -> tuple[float, int]:
    """Return how far the output of another SAE on raw activations is from ours.

    Both run in float64 on the same random activations, so that a difference comes from the
    stored numbers. Ours takes the activations times the layer's norm factor.

    Returns:
        Largest difference as a share of the largest value, over the rows with the same active
        latents; the number of other rows.

    Raises:
        UserError: no test activations activate latents of ours.
    """
    ours, theirs = copy.deepcopy(sae).double().eval(), copy.deepcopy(other).double().eval()
    x = made_up_activations(ours, factor)
    our_latents, their_latents = ours.encode(x * factor), theirs.encode(x)
    expected, output = ours.decode(our_latents) / factor, theirs.decode(their_latents)
    ours_active, theirs_active = (
        torch.zeros(len(x), sae.d_sae, dtype=x.dtype).scatter(1, each.indices, each.acts) > 0
        for each in (our_latents, their_latents)
    )
    same = (ours_active == theirs_active).all(dim=1)
    if not same.any():
        return float("inf"), len(x)
    largest = expected[same].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((output - expected)[same].abs().max() / largest), int((~same).sum())


def made_up_activations(sae: SAE, factor: float) -> Float[Tensor, "row d_model"]:
    """Return random raw activations around the SAE's b_dec, in the directions of its decoder.

    They grow until most rows activate a latent, for thresholds may have any size. The SAE is in
    float64 and takes them times the factor.

    Raises:
        UserError: not even the largest ones do.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(ROWS, sae.d_sae, generator=generator, dtype=torch.float64)
    weights *= torch.rand(ROWS, sae.d_sae, generator=generator, dtype=torch.float64) < 0.05
    noise = torch.randn(ROWS, sae.d_model, generator=generator, dtype=torch.float64)
    rows = weights @ sae.directions().cpu() + 0.1 * noise / sae.d_model**0.5
    rows /= rows.norm(dim=1, keepdim=True)
    for size in SIZES:
        x = size * rows + sae.b_dec.detach().cpu()
        if (sae.encode(x).acts > 0).any(dim=1).double().mean() > 0.5:
            return x / factor
    raise UserError(
        f"an SAE of {sae.d_sae} latents stays inactive on test activations with norms up to "
        f"{SIZES[-1]:.0e}, so the exported copy cannot be compared with it. Its thresholds are "
        "probably damaged: check the saved weights, or export an earlier run."
    )
