"""Sizes of the stream that cannot be, told before anything is packed or loaded."""

from groupsae.data.splits import Split
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError


def check_sizes(
    context: int, lm: FrozenLM, tokens: int, blocks_per_step: int, blocks_per_forward: int
) -> None:
    """Raise UserError if a size is no whole number, or too large or too small.

    That is: a block longer than the model reads, a step or a forward without a block, or less
    than one step of tokens.

    A step and a forward of the language model may be of any two sizes: a step takes as many
    forwards as it needs, the last one of what is left.

    Args:
        context: tokens in a block.
        lm: that reads them.
        tokens: training budget.
        blocks_per_step: over all processes.
        blocks_per_forward: at most.
    """
    sizes: dict[str, object] = {
        "context": context,
        "blocks_per_step": blocks_per_step,
        "blocks_per_forward": blocks_per_forward,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"stream.{name} is {size!r}; it must be a whole number of at least 1.")
    if context > lm.geometry.context:
        raise UserError(
            f"stream.context is {context}, but {lm.name} reads at most "
            f"{lm.geometry.context} tokens."
        )
    if tokens < blocks_per_step * context:
        raise UserError(
            f"tokens={tokens:,} is less than one step of stream.blocks_per_step="
            f"{blocks_per_step} blocks of {context} tokens: raise it, or lower the step."
        )


def check_fills_a_step(split: Split, num_blocks: int, blocks_per_step: int) -> None:
    """Raise UserError if a split has fewer blocks than a step."""
    if num_blocks >= blocks_per_step:
        return
    raise UserError(
        f"the {split} split has {num_blocks} blocks, less than one step of {blocks_per_step}: "
        "give more text, or lower stream.blocks_per_step"
        + (f" or raise stream.{split}_fraction." if split != "train" else ".")
    )
