"""Writes the SAEs of a suite as folders of another library, and proves that they are the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from groupsae.files.atomic import atomic_folder
from groupsae.interop.fold import onto_raw
from groupsae.interop.format import About, Format
from groupsae.interop.formats import check_holds
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.suite.suite import Suite

ROWS = 64
TOLERANCE = 1e-5  # of the largest activation; float32 rounds to 6e-8, and d_model of them add up
SIZES = [3.0 * 10**power for power in range(10)]  # of test activations, in scaled units
TIES = 0.05  # share of rows whose latents may differ because two activations all but tie


@dataclass(frozen=True)
class Written:
    """One folder of an export.

    Attributes:
        folder: its name.
        group: the SAE in it.
        layer: that it is for.
        difference: largest between its output and ours, as a share of the largest value.
        ties: rows with another choice of latents, where rounding decides; left out of that.
    """

    folder: str
    group: str
    layer: int
    difference: float
    ties: int


def export_suite(suite: Suite, chosen: Format, target: Path, *, overwrite: bool) -> list[Written]:
    """Write one folder for each layer, each read back and compared with the suite.

    Args:
        suite: the SAEs.
        chosen: the format.
        target: folder to be; it appears when everything is written and compared.
        overwrite: replace a target that is there.

    Returns:
        What was written, by layer.

    Raises:
        UserError: the format cannot hold an SAE, the target cannot be written, or what was read
            back computes something else.
    """
    for name, sae in suite.saes.items():
        check_holds(chosen, sae, name)
    abouts = [
        About.of(group := suite.group_of(layer), layer, suite.configs[group])
        for layer in suite.layers
    ]
    folders = [chosen.folder(about) for about in abouts]  # may refuse: before anything is written
    written = []
    with atomic_folder(target, overwrite=overwrite, ours=only(chosen)) as beside:
        for about, name in zip(abouts, folders, strict=True):
            folder = beside / name
            folder.mkdir(parents=True)
            sae = suite.saes[about.group]
            chosen.write(folder, onto_raw(sae, about.norm_factor), about)
            again = chosen.read(folder).sae
            difference, ties = compare(sae, about.norm_factor, again)
            if not difference <= TOLERANCE or ties > TIES * ROWS:
                raise UserError(
                    f"{target / name} would not compute what {about.group} does: the outputs "
                    f"differ by {difference:.1e} of the largest value ({TOLERANCE:.0e} is "
                    f"allowed), and {ties} of {ROWS} rows choose other latents. Nothing was "
                    "written; please report this."
                )
            written.append(Written(name, about.group, about.layer, difference, ties))
    return written


def only(chosen: Format) -> Callable[[Path], bool]:
    """Return the test of a folder for holding SAEs of one format and nothing else."""
    return lambda folder: all(chosen.mine(each) for each in folder.iterdir())


@torch.no_grad()
def compare(sae: SAE, factor: float, other: SAE) -> tuple[float, int]:
    """Return how far the output of another SAE on raw activations is from ours.

    Both run in float64 on the same random activations, so that what is seen comes from the
    stored numbers.

    Args:
        sae: ours, on activations times the factor.
        factor: the layer's.
        other: on the activations as they are.

    Returns:
        max |x_hat' - x_hat| / max |x_hat| over the rows with the same active latents, and the
        number of other rows.

    Raises:
        UserError: no activations are found that activate latents of ours.
    """
    ours, theirs = copy.deepcopy(sae).double().eval(), copy.deepcopy(other).double().eval()
    x = made_up_activations(ours, factor)
    mine, yours = ours.encode(x * factor), theirs.encode(x)
    expected, found = ours.decode(mine) / factor, theirs.decode(yours)
    active = [
        torch.zeros(len(x), sae.d_sae, dtype=x.dtype).scatter(1, each.indices, each.acts) > 0
        for each in (mine, yours)
    ]
    same = (active[0] == active[1]).all(dim=1)
    if not same.any():
        return float("inf"), len(x)
    largest = expected[same].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found - expected)[same].abs().max() / largest), int((~same).sum())


def made_up_activations(sae: SAE, factor: float) -> Float[Tensor, "row d_model"]:
    """Return random raw activations around the SAE's b_dec, in directions that it has.

    They are made larger until most of them activate something: thresholds may be of any size.

    Args:
        sae: in float64, on activations times the factor.
        factor: the layer's.

    Raises:
        UserError: none of the sizes does.
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
        "an SAE cannot be compared with what was written, for no activations up to a norm of "
        f"{SIZES[-1]:.0e} activate its latents: its thresholds are out of reach. Train it again."
    )
