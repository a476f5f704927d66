"""What each library calls a place in a language model, and the model itself."""

import re

from groupsae.lm.hookpoints import HOOKPOINTS

_LENS = re.compile(r"^blocks\.(\d+)\.hook_(\w+)$")
_MODULE = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks?)\.(\d+)(?:\.(.+))?$")
_DICTIONARY = re.compile(r"(resid_post|resid_pre|mlp_out|attn_out|attention_out)_layer_(\d+)")
_ATTENTION = ("attention", "attn", "self_attn", "self_attention")
_MLP = ("mlp", "feed_forward")


def lens_hook(hookpoint: str, layer: int) -> str:
    """Return TransformerLens' name of a hookpoint.

    >>> lens_hook("resid_post", 4)
    'blocks.4.hook_resid_post'
    """
    return f"blocks.{layer}.hook_{hookpoint}"


def parse_lens_hook(name: object) -> tuple[int, str] | None:
    """Return layer and hookpoint of TransformerLens' name; None if it is none of ours."""
    found = _LENS.match(str(name))
    if found is None or found[2] not in HOOKPOINTS:
        return None
    return int(found[1]), found[2]


def lens_model(name: str) -> str:
    """Return TransformerLens' name of a model of the Hub.

    Those of these organisations go by the last part of their id; others by the whole of it.

    >>> lens_model("EleutherAI/pythia-160m-deduped"), lens_model("Qwen/Qwen2.5-0.5B")
    ('pythia-160m-deduped', 'Qwen/Qwen2.5-0.5B')
    """
    organisation, slash, last = name.rstrip("/").rpartition("/")
    short = organisation in ("EleutherAI", "openai-community", "google", "roneneldan")
    local = slash and ("/" in organisation or organisation in ("", ".", ".."))
    return last if short or local else name


def module_path(hookpoint: str, layer: int, modules: list[str] | None) -> str | None:
    """Return the module of the Hugging Face base model whose output a place is, sparsify's name.

    What is read before a block is what the block below it puts out.

    Args:
        hookpoint: resid_post, resid_pre, mlp_out or attn_out.
        layer: the block.
        modules: what is hooked of every layer, as `cfg.json` holds it; None: not known.

    Returns:
        The path; None before the first block, and where modules are not known.

    >>> module_path("attn_out", 1, ["h.0.attn", "h.1.attn"])
    'h.1.attn'
    >>> module_path("resid_pre", 1, ["layers.0", "layers.1"])
    'layers.0'
    """
    below = layer - 1 if hookpoint == "resid_pre" else layer
    return None if modules is None or below < 0 else modules[below]


def parse_module_path(name: str) -> tuple[int, str] | None:
    """Return layer and hookpoint of a module's path; None if it is none of ours.

    >>> parse_module_path("gpt_neox.layers.4.mlp"), parse_module_path("layers.4")
    ((4, 'mlp_out'), (4, 'resid_post'))
    """
    found = _MODULE.search(name)
    if found is None:
        return None
    part = found[2]
    if part is None:
        return int(found[1]), "resid_post"
    if part in _MLP:
        return int(found[1]), "mlp_out"
    return (int(found[1]), "attn_out") if part in _ATTENTION else None


def is_in_a_block(name: str) -> bool:
    """Return whether a dotted name is that of a block, or of anything within one.

    >>> is_in_a_block("decoder.layers.1.fc2"), is_in_a_block("blocks.1.hook_mlp_out")
    (True, True)
    """
    return _MODULE.search(name) is not None


def dictionary_name(hookpoint: str, layer: int) -> str:
    """Return the name that dictionary_learning's recipes give a place: `resid_post_layer_4`."""
    return f"{hookpoint}_layer_{layer}"


def parse_dictionary_name(name: str) -> tuple[int, str] | None:
    """Return layer and hookpoint of such a name, anywhere in a path; None if there is none."""
    found = _DICTIONARY.findall(name)
    if not found:
        return None
    hookpoint, layer = found[-1]
    return int(layer), hookpoint.replace("attention_out", "attn_out")
