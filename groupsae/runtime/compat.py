"""The private parts of other libraries that this package uses, all of them.

`tests/runtime/test_compat.py` tests what each function assumes. Nothing is imported at the top:
rooms that must load without Lightning or torch use this module as well.
"""

from collections.abc import Callable
from typing import Any

# ---- Lightning (pyproject.toml: < 2.7, as a renamed attribute would fail silently) -------------


def disable_signal_handling(trainer: Any) -> None:
    """Switch off Lightning's own answer to signals.

    On SIGTERM it exits without a checkpoint and with status 0; with several processes it asks
    before every step whether a signal came, for which the host waits; under SLURM it saves on
    SIGUSR1 in the middle of a step.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def skip_next_validation(trainer: Any) -> None:
    """Keep a trainer that should stop from validating before it ends."""
    trainer.fit_loop.epoch_loop._skip_next_val = True


def release_started_processes(launcher: Any) -> list[Any]:
    """Stop watching the processes that Lightning started; return them.

    Lightning's observer kills this process when one that it watches ends with an error. It reads
    the launcher's list of processes, and ends when that is empty.
    """
    processes = list(launcher.procs)
    launcher.procs.clear()
    return processes


def make_wandb_offline(logger: Any) -> None:
    """Let a WandbLogger that has not begun record offline."""
    logger._offline, logger._wandb_init["mode"] = True, "offline"


# ---- torch (a missing operator raises an error) ------------------------------------------------


def all_to_all(rows: Any, received: list[int], sent: list[int], mesh: Any) -> Any:
    """Start an all-to-all of rows; the first use of the result waits for it."""
    from torch.distributed import _functional_collectives as functional

    return functional.all_to_all_single(rows, received, sent, mesh)


def onednn_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Return x W^T + b by oneDNN, which must be available."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def compiles_hooks(module: Any, outside: bool) -> bool:
    """Return whether torch.compile took the hooks of modules inside, which then may not run.

    `module.compile()` compiles the call of the module, hooks of its own included;
    `torch.compile(module)` wraps the module (`outside`: what is asked about is inside).
    """
    wrapped = outside and "_orig_mod" in module._modules
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def private_flop_formulas(
    *, attention: Callable[..., int], rows: Callable[..., int], linear: Callable[..., int]
) -> dict[Any, Callable[..., int]]:
    """Return operators without a public name -> FLOPs from the shapes of their arguments."""
    import torch

    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._embedding_bag_forward_only: rows,
        aten._embedding_bag: rows,
    }
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = linear
    return formulas


def of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Let PyTorch's FLOP counter call a formula with tensors instead of their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula
