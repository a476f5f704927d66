"""What each library calls a place in a language model, and the model itself."""

import re

from groupsae.errors import UserError

HOOKPOINTS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
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


def module_path(
    hookpoint: str,
    layer: int,
    model: str,
    *,
    stack: str | None = None,
    blocks_path: str | None = None,
    submodule: str | None = None,
) -> str:
    """Return the path of a module of the Hugging Face base model, sparsify's name of a place.

    `layers.4` is the block itself. What is read before a block is what the block below it puts
    out. Attention and MLP are called as in the model's family, unless they were named by hand:
    `gpt2` has `h.4.attn`, GPT-NeoX (Pythia) `layers.4.attention`, most others
    `layers.4.self_attn`.

    Raises:
        UserError: there is no block below layer 0.

    >>> module_path("resid_post", 4, "EleutherAI/pythia-160m")
    'layers.4'
    >>> module_path("resid_pre", 4, "google-t5/t5-small", stack="encoder")
    'encoder.block.3'
    """
    if hookpoint == "resid_pre":
        if layer == 0:
            raise UserError(
                "resid_pre of layer 0 is no module's output, and format=sparsify names modules: "
                "use format=saelens or dictionary_learning."
            )
        hookpoint, layer = "resid_post", layer - 1
    family = model.lower()
    gpt2, t5 = "gpt2" in family, "t5" in family
    neox = any(word in family for word in ("pythia", "neox", "tiny"))
    blocks = (blocks_path or ("h" if gpt2 else "block" if t5 else "layers")).rpartition(".")[2]
    block = f"{stack + '.' if stack else ''}{blocks}.{layer}"
    if hookpoint == "resid_post":
        return block
    attention = "attn" if gpt2 else "attention" if neox else "self_attn"
    return f"{block}.{submodule or ('mlp' if hookpoint == 'mlp_out' else attention)}"


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
