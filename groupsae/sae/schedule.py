"""How sparsity sets in over the training, and what its numbers may be."""

from groupsae.errors import UserError


def ramp(start: float, end: float, warmup: float, progress: float) -> float:
    """Return the value after a share of the training: start to end over `warmup`, linearly."""
    if progress >= warmup:
        return end
    return start + (end - start) * progress / warmup


def check_share(name: str, value: float) -> None:
    """Raise UserError unless a value of an SAE is a share, 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"sae.{name} is {value}; it must lie between 0 and 1.")


def check_positive(**values: float) -> None:
    """Raise UserError unless all values of an SAE are above zero."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"sae.{name} is {value}; it must be above 0.")
