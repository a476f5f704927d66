"""The one dense product of a training step."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from groupsae.runtime.compat import onednn_linear


@torch.no_grad()
def affine(
    x: Float[Tensor, "row d"], weight: Float[Tensor, "n d"], bias: Float[Tensor, "n"]
) -> Float[Tensor, "row n"]:
    """Return x W^T + b, without gradients.

    In float32 on CPUs with AVX-512 by oneDNN: on AMD's it was measured at twice the rate of MKL,
    which torch would use (440 against 211 GFLOP/s on two cores of Zen 5), with the same error; on
    Intel's, who makes both, it was not tried. With AVX2 the two are alike. The rule asks for the
    instructions, not for a trial's time, so that a resumed run adds up as the first one did.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    ):
        result: Tensor = onednn_linear(x, weight, bias)
        return result
    return F.linear(x, weight, bias)
