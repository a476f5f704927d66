"""Arguments that a user passes on to transformers' from_pretrained as `model.load`."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from groupsae.runtime.errors import UserError
from groupsae.runtime.secrets import secret_in

# options with a key of their own
OURS = {
    "revision": "model.revision",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "config": "model.name",
}
# would run code from the weights' files
PICKLED = ("weights_only", "pickle_module")
# config and tokenizer are found in the same place as the weights
HUB = (
    "trust_remote_code", "code_revision", "cache_dir", "local_files_only", "subfolder",
    "gguf_file",
)  # fmt: skip
# packages that transformers needs for an option
NEEDS = {
    "device_map": ("accelerate",),
    "quantization_config": ("accelerate",),
    "gguf_file": ("accelerate", "gguf"),
}
# where weights are and how they get there changes no activation
PLACE = (
    "device_map", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers",
    "low_cpu_mem_usage", "cache_dir", "local_files_only", "use_safetensors",
)  # fmt: skip


def check_load_options(load: object) -> None:
    """Raise UserError if an option is not allowed, or needs a package that is not installed.

    Secrets are refused at any depth, because run folders and uploads contain the configuration.
    """
    if not isinstance(load, Mapping):
        raise UserError(
            f"model.load is {load!r}; use arguments of from_pretrained, such as "
            "{device_map: auto}, or {} for none."
        )
    found = secret_in(load)
    secret = found[1] if found is not None else "proxies" if "proxies" in load else None
    if secret is not None:
        raise UserError(
            f"model.load contains {secret}, and run folders keep their configuration: leave it "
            "out and use the environment variable HF_TOKEN, or HTTPS_PROXY."
        )
    for name in load:
        if name in PICKLED:
            raise UserError(
                f"model.load contains {name}: leave it out, weights are read without running code."
            )
        if name in OURS:
            raise UserError(f"model.load contains {name}: leave it out and use {OURS[name]}.")
        missing = [each for each in NEEDS.get(name, ()) if find_spec(each) is None]
        if missing:
            raise UserError(
                f"model.load.{name} needs the package{'s' * (len(missing) > 1)} "
                f"{' and '.join(missing)}, not installed here: pip install {' '.join(missing)}."
            )


def hub_options(load: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that config and tokenizer need as well."""
    return {name: load[name] for name in HUB if name in load}


def recorded_options(load: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that affect the activations, as plain values."""
    kept = {name: value for name, value in load.items() if name not in PLACE}

    def plain(value: Any) -> Any:
        return value.to_dict() if hasattr(value, "to_dict") else str(value)

    recorded: dict[str, Any] = json.loads(json.dumps(kept, default=plain))
    return recorded
