"""Find the blocks of a transformer by structure, or by the path that the user gives."""

from torch import nn

from groupsae.runtime.errors import UserError


def find_blocks(model: nn.Module, num_layers: int, path: str | None = None) -> nn.ModuleList:
    """Return the transformer blocks: the one ModuleList whose length is the model's depth.

    Lists inside another such list (experts of a block) do not count. If a model has several (a
    text and a vision tower of equal depth), the one in its decoder counts. `path` names the list,
    such as `model.layers` or its last part.

    Raises:
        UserError: no list or several lists of that length exist; lists what was found.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    names = [name for name, module in lists.items() if len(module) == num_layers]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    name = type(model).__name__
    found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none at all"
    if path is not None:
        # with a head the path has a prefix that it lacks without one
        fitting = [n for n in outer if f".{n}".endswith(f".{path}") or path.endswith(f".{n}")]
        if len(fitting) == 1:
            return lists[fitting[0]]
        raise UserError(
            f"model.blocks_path is '{path}', which names no single list of {num_layers} blocks in "
            f"{name}; its module lists are: {found}. Name one of them."
        )
    if len(outer) > 1 and hasattr(model, "get_decoder"):
        decoder: object = model.get_decoder()  # type: ignore[operator]
        if isinstance(decoder, nn.Module) and decoder is not model:
            within = {id(module) for module in decoder.modules()}
            outer = [n for n in outer if id(lists[n]) in within]
    if len(outer) == 1:
        return lists[outer[0]]
    raise UserError(
        f"{name} has no single list of {num_layers} blocks; its module lists are: {found}. Name "
        "the list of its blocks with model.blocks_path=<path>."
    )
