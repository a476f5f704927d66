"""The options of the store, checked before anything slow is imported."""

from pathlib import Path

from groupsae.runtime.errors import UserError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # torch's names, safetensors'


def check_store(folder: object, dtype: object) -> None:
    """Raise UserError if activations cannot be stored like that."""
    if folder is None:
        return
    if not isinstance(folder, str) or not folder:
        raise UserError(f"data.cache is {folder!r}: give a folder, or null to store nothing.")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"data.cache={folder} is a file: give a folder, existing or new.")
    if dtype not in DTYPES:
        raise UserError(
            f"data.cache_dtype is {dtype!r}: use bfloat16 (half the size; exact for a model that "
            "runs in it), float16 or float32 (exact for every model)."
        )
