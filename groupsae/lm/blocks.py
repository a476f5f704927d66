"""Find the blocks of a transformer by structure, and run it only as far as needed."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from groupsae.errors import UserError


def find_blocks(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """Return the list of transformer blocks: the one ModuleList as long as the model is deep.

    Lists inside another such list (experts of a block) do not count.

    Args:
        model: any Hugging Face model.
        num_layers: the config's `num_hidden_layers`.

    Raises:
        UserError: none or several lists of that length exist; names what was found.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    names = [name for name, module in lists.items() if len(module) == num_layers]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    if len(outer) == 1:
        return lists[outer[0]]
    found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none at all"
    raise UserError(
        f"{type(model).__name__} should have exactly one list of {num_layers} blocks; "
        f"its module lists are: {found}. This architecture is not supported."
    )


class _StopForward(Exception):
    """Raised by the last needed hook: nothing after that block is computed."""


def run_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    layers: Iterable[int],
    visit: Callable[[int, Tensor], Tensor | None],
    stop: bool,
    **inputs: Any,
) -> Any:
    """Run the model once and show `visit` the residual stream after each of `layers`.

    `visit(layer, residual)` gets `resid_post`, the raw output of the block, shape
    [batch, pos, d_model]; a tensor that it returns takes the residual's place. (The last entry
    of Hugging Face's `hidden_states` is *after* the final norm, so hooks are the only way to
    the last layer.) Hooks are removed whatever happens.

    Args:
        model: the model that owns the blocks.
        blocks: its transformer blocks.
        layers: indices of the blocks to show.
        visit: called in the order of the layers.
        stop: end the forward pass after the last of `layers`; then None is returned.
        **inputs: passed to the model.
    """
    wanted = sorted(set(layers))

    def hook_for(layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            residual = output if isinstance(output, Tensor) else output[0]
            replaced = visit(layer, residual)
            if stop and layer == wanted[-1]:
                raise _StopForward
            if replaced is None:
                return None
            return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

        return hook

    handles: list[RemovableHandle] = []
    try:
        for layer in wanted:
            handles.append(blocks[layer].register_forward_hook(hook_for(layer)))
        return model(**inputs, use_cache=False)
    except _StopForward:
        return None
    finally:
        for handle in handles:
            handle.remove()
