"""Find the blocks of a transformer by structure, or by the path that the user gives."""

from torch import nn

from groupsae.runtime.errors import UserError


def find_blocks(model: nn.Module, num_layers: int, path: str | None = None) -> nn.ModuleList:
    """Return the list of transformer blocks: the one ModuleList as long as the model is deep.

    Lists inside another such list (experts of a block) do not count. Where a model has several
    (a text and a vision tower of equal depth), those of its decoder do, as transformers names it.

    Args:
        model: any Hugging Face model, or one of its stacks.
        num_layers: the config's number of hidden layers.
        path: of the list by name, such as `model.layers` or the end of it; None looks for it.

    Raises:
        UserError: none or several lists of that length exist, or the path names none; says what
            was found.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    names = [name for name, module in lists.items() if len(module) == num_layers]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    name = type(model).__name__
    found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none at all"
    if path is not None:
        # a head puts a prefix before the path that the bare model has, or takes it away
        fitting = [n for n in outer if f".{n}".endswith(f".{path}") or path.endswith(f".{n}")]
        if len(fitting) == 1:
            return lists[fitting[0]]
        raise UserError(
            f"model.blocks_path is '{path}', which is not one list of {num_layers} blocks in "
            f"{name}; its module lists are: {found}."
        )
    if len(outer) > 1 and hasattr(model, "get_decoder"):
        decoder: object = model.get_decoder()  # type: ignore[operator]
        if isinstance(decoder, nn.Module) and decoder is not model:
            within = {id(module) for module in decoder.modules()}
            outer = [n for n in outer if id(lists[n]) in within]
    if len(outer) == 1:
        return lists[outer[0]]
    raise UserError(
        f"{name} should have exactly one list of {num_layers} blocks; its module lists are: "
        f"{found}. Name the right one with model.blocks_path=<path>, if there is one."
    )
