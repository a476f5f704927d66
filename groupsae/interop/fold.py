"""Exact changes of an SAE's tensors that leave what it computes as it was.

Names and shapes are ours: `W_enc` and `W_dec` [d_sae, d_model], the input has `b_dec` subtracted.
"""

import copy
import math

import torch
from torch import Tensor

from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE

Tensors = dict[str, Tensor]

SCALED = ("b_enc", "b_dec", "b_gate", "b_mag", "threshold")
UNCHANGED = ("W_enc", "W_dec", "r_mag")
ROUNDING = 1e-6  # a decoder row this close to unit norm is left alone
NOTICEABLE = 1e-3


@torch.no_grad()
def onto_raw(sae: SAE, factor: float) -> SAE:
    """Return a copy that takes activations as they are, not multiplied by the norm factor.

    With s the factor and z = W_enc (s x - b_dec) + b_enc = s (W_enc (x - b_dec / s) + b_enc / s):
    biases and thresholds are divided by s, and so are the latents; the weights stay, so the
    decoder keeps its unit norm, and TopK chooses the same latents because s > 0.

    Raises:
        UserError: the SAE has a tensor of which this is not known.
    """
    folded = copy.deepcopy(sae)
    for name, tensor in folded.state_dict().items():
        if name in SCALED:
            tensor.div_(factor)
        elif name == "log_threshold":
            tensor.sub_(math.log(factor))
        elif name not in UNCHANGED:
            raise UserError(
                f"{type(sae).__name__} has a tensor {name}, and how a norm factor is folded into "
                "it is not known: this architecture cannot be exported."
            )
    return folded


def subtract_b_dec(tensors: Tensors, sign: int = 1) -> Tensors:
    """Return the tensors for an SAE that encodes x - b_dec, of one that encodes x.

    W x + b = W (x - b_dec) + (b + W b_dec). With sign = -1 the other way round.
    """
    shift = sign * (tensors["W_enc"] @ tensors["b_dec"])
    changed = dict(tensors)
    if "b_mag" in tensors:
        changed["b_gate"] = tensors["b_gate"] + shift
        changed["b_mag"] = tensors["b_mag"] + tensors["r_mag"].exp() * shift
    else:
        changed["b_enc"] = tensors["b_enc"] + shift
    return changed


def unit_decoder(kind: str, tensors: Tensors, *, by_norm: bool = False) -> tuple[Tensors, str]:
    """Return the tensors with decoder rows of unit norm where that changes nothing, and a note.

    A row's norm moves into the latent: exact for relu, jumprelu and gated, and for topk whose
    choice already weighs latents with their rows' norms. Other topk kinds would choose other
    latents, so their rows are kept.

    Args:
        kind: of `groupsae.suite.build.KINDS`.
        tensors: of one SAE; `threshold` of jumprelu is [d_sae].
        by_norm: topk chooses by activation times norm.

    Returns:
        The tensors; a sentence for the user, empty if there is nothing to say.
    """
    norms = tensors["W_dec"].norm(dim=1)
    norms = torch.where(norms == 0, torch.ones_like(norms), norms)
    off = float((norms - 1).abs().max())
    if off <= ROUNDING:
        return tensors, ""
    if kind in ("topk", "batchtopk", "matryoshka") and not by_norm:
        kept = "its decoder rows do not have unit norm and are kept so: the choice of latents "
        kept += f"depends on them (norms {float(norms.min()):.3g} to {float(norms.max()):.3g})"
        return tensors, kept if off > NOTICEABLE else ""
    changed = {**tensors, "W_dec": tensors["W_dec"] / norms.unsqueeze(1)}
    if kind == "gated":
        changed |= {"r_mag": tensors["r_mag"] + norms.log(), "b_mag": tensors["b_mag"] * norms}
    else:
        changed |= {
            "W_enc": tensors["W_enc"] * norms.unsqueeze(1),
            "b_enc": tensors["b_enc"] * norms,
        }
    if kind == "jumprelu":
        changed["threshold"] = tensors["threshold"] * norms
    return changed, "the norms of its decoder rows were folded into its latents"
