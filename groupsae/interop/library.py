"""What the formats of other libraries share: files, exact changes of weights, one interface."""

import copy
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from groupsae import __version__
from groupsae.files.reading import damaged, missing, read_json
from groupsae.files.tensors import take
from groupsae.lm.hookpoints import HALVES, hookpoint_of
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.sae.batchtopk import BatchTopK
from groupsae.sae.gated import Gated
from groupsae.sae.jumprelu import JumpReLU
from groupsae.sae.matryoshka import Matryoshka
from groupsae.sae.relu import ReLU
from groupsae.sae.topk import TopK

TRAINED_ON = ("text", "copies", "stream")  # keys of our metadata about the training text
METADATA_FORMAT = 1  # version of our entry in other formats' free metadata
ARCHITECTURES: tuple[type[SAE], ...] = (TopK, BatchTopK, Matryoshka, JumpReLU, ReLU, Gated)
KINDS = {architecture.__name__.lower(): architecture for architecture in ARCHITECTURES}
TOPK_KINDS = ("topk", "batchtopk", "matryoshka")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of an exported SAE, for the format's free metadata.

    Attributes:
        group: name of the SAE in its run, such as `layers.3-5`; `layers` are those of the group.
        layer: the layer that this copy serves; `norm_factor` was folded into its biases.
        module: path in the bare Hugging Face model of the module with this output; None for the
            input of the first block, and where the run does not name its modules.
        text, copies, stream: key of the text that it was trained on, the copies of documents
            left out there, and the options that split it; None where the run does not name them.
    """

    group: str
    layers: list[int]
    layer: int
    norm_factor: float
    hookpoint: str
    model: str
    revision: str | None
    dtype: str | None
    context: int | None
    prepend_bos: bool
    stack: str | None
    module: str | None
    text: str | None = None
    copies: int | None = None
    stream: dict[str, Any] | None = None

    @classmethod
    def of(cls, group: str, layer: int, config: dict[str, Any]) -> "Origin":
        """Return it for one of the layers of our `cfg.json`."""
        hookpoint, modules = config.get("hookpoint", "resid_post"), config.get("modules")
        # the input of a block is the output of the block below
        index = layer - 1 if hookpoint == "resid_pre" else layer
        return cls(
            group=group,
            layers=list(config["layers"]),
            layer=layer,
            norm_factor=float(config["norm_factors"][str(layer)]),
            hookpoint=hookpoint,
            model=str(config.get("model", "unknown")),
            prepend_bos=bool(config.get("prepend_bos", False)),
            module=None if modules is None or index < 0 else modules[index],
            **{key: config.get(key) for key in ("revision", "dtype", "context", "stack")},
            **{key: config.get(key) for key in TRAINED_ON},
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a model in a local folder goes by the folder's name."""
        model = Path(self.model).name if Path(self.model).is_absolute() else self.model
        ours = {"format": METADATA_FORMAT, "groupsae": __version__}
        return {**ours, **asdict(self), "model": model}


class Place(NamedTuple):
    """Where in a language model an SAE belongs, as far as its files name it."""

    layer: int
    hookpoint: str | None = None
    stack: str | None = None
    model: str | None = None
    module: str | None = None  # path of the module whose output it encodes

    def options(self) -> str:
        """Return the options of a command that reads the language model there."""
        found = IN_A_BLOCK.search(self.module or "")
        if found is None or found[3] is None:
            return f"model.hookpoint={self.hookpoint}"
        return f"model.hookpoint={self.hookpoint or 'mlp_out'} model.submodule={found[3]}"


IN_A_BLOCK = re.compile(r"(?:^|\.)((?:layers|layer|h|blocks?)\.(\d+)(?:\.(.+))?)$")


def parse_module_path(path: str) -> Place | None:
    """Return the place of a module's output: `gpt_neox.layers.4.mlp`; None outside of a block.

    Its hookpoint is None where the module is not in one of a block's halves.

    >>> parse_module_path("gpt_neox.layers.4.mlp")[:2], parse_module_path("layers.4")[:2]
    ((4, 'mlp_out'), (4, 'resid_post'))
    """
    found = IN_A_BLOCK.search(path)
    if found is None:
        return None
    hookpoint = "resid_post" if found[3] is None else hookpoint_of(found[3])
    return Place(int(found[2]), hookpoint, module=path)


def same_output(one: str, other: str) -> bool:
    """Return whether the outputs of two modules are the same, whatever wraps their blocks."""
    first, second = IN_A_BLOCK.search(one), IN_A_BLOCK.search(other)
    if first is None or second is None:
        return False
    wrappers = one[: first.start()].split(".") + other[: second.start()].split(".")
    inside, its_inside = (
        # the MLP of GPT-NeoX returns what its last layer does (Bloom's, in h.4, adds the residual)
        re.sub(r"^(layers\.\d+\.mlp)\.dense_4h_to_h$", r"\1", found[1])
        for found in (first, second)
    )
    return inside == its_inside and not {"encoder", "decoder"} <= {*wrappers}


def agreed_place(folder: Path, named: Mapping[str, Place | None]) -> Place | None:
    """Return the first place that is known; the names say where each stands.

    Raises:
        UserError: two contradict each other.
    """
    known = [(source, place) for source, place in named.items() if place is not None]
    for (one, first), (other, second) in combinations(known, 2):
        pairs = zip(first[:2], second[:2], strict=True)
        if any(a != b for a, b in pairs if a is not None and b is not None):
            raise UserError(
                f"{folder} contradicts itself: its {one} is for {_words(first)}, and its {other} "
                f"for {_words(second)}. Correct the one that is wrong."
            )
    return known[0][1] if known else None


def _words(place: Place) -> str:
    return f"layer {place.layer}" + (f" ({place.hookpoint})" if place.hookpoint else "")


@dataclass(frozen=True)
class ImportedSAE:
    """An SAE read from a folder of another library."""

    sae: SAE  # works on activations times the norm factor
    norm_factors: dict[int, float]  # layer that it serves -> factor
    place: Place  # in the language model; one of its layers
    notes: list[str]  # sentences for the user
    folder: Path = Path()  # where it was read; `read_folder` sets this and the next
    format: str = ""  # that it was read as
    trained_on: dict[str, Any] = field(default_factory=dict)  # what an export of ours has of it

    @property
    def layers(self) -> list[int]:
        """Return the layers that it serves."""
        return list(self.norm_factors)


def imported_sae(
    kind: str,
    tensors: Tensors,
    place: Place,
    arguments: dict[str, Any],
    *,
    norm_factors: dict[int, float] | None = None,
    by_norm: bool = False,
    notes: Sequence[str] = (),
) -> ImportedSAE:
    """Return the SAE with these tensors, its decoder rows of unit norm where that is exact.

    `build` and `unit_decoder` explain the arguments. Without norm factors, the layer's is 1.
    """
    tensors, note = unit_decoder(kind, tensors, by_norm=by_norm)
    all_notes = [text for text in (note, *notes) if text]
    return ImportedSAE(
        build(kind, tensors, **arguments), norm_factors or {place.layer: 1.0}, place, all_notes
    )


@dataclass(frozen=True)
class Library:
    """The format of one library: a folder for each SAE."""

    name: str  # value of `format=`, and the library's name on the Hub
    kinds: dict[str, str]  # our kinds of SAE that it can hold -> its name for them
    folder_name: Callable[[Origin], str]  # of an SAE
    # an SAE that takes raw activations, into an existing folder
    write: Callable[[Path, SAE, Origin], None]
    recognises: Callable[[Path], bool]  # whether a folder has this format
    # the SAE in such a folder; the names of the folder and of those around it may name its place
    read_named: Callable[[Path, Sequence[str]], ImportedSAE]
    snippet: str  # Python that loads an SAE from the Hub, with {repo} and {folder}
    package: str  # on PyPI
    load: Callable[[Path], Any]  # the library's own object from such a folder, on the CPU

    def read(self, folder: Path, root: Path | None = None) -> ImportedSAE:
        """Return the SAE in a folder that was found below `root`; no name above it counts."""
        around = [each.absolute() for each in (folder, *folder.parents)]
        end = around.index((root or folder).absolute()) + 1
        return self.read_named(folder, [each.name for each in around[:end]])

    def own_object(self, sae: SAE, origin: Origin, asked: str) -> Any:
        """Return an SAE that takes raw activations as the library's own object, on the CPU.

        It is written in this format, and the library loads it. `asked` names the call in messages.

        Raises:
            UserError: the library is not installed.
        """
        with TemporaryDirectory() as folder:
            self.write(Path(folder), sae, origin)
            try:
                return self.load(Path(folder))
            except ImportError as error:
                raise UserError(
                    f"{asked} needs {self.name} ({error}): pip install {self.package}"
                ) from error


# ---- our SAEs <-> tensors -------------------------------------------------------------------


def kind_of(sae: SAE) -> str:
    """Return the kind of an SAE, a key of `KINDS`."""
    return type(sae).__name__.lower()


def build(kind: str, tensors: Tensors, **arguments: Any) -> SAE:
    """Return an SAE with these tensors, in evaluation mode.

    Args:
        kind: a key of `KINDS`.
        tensors: with our names and shapes; jumprelu's `threshold` is [d_sae], and one at or below
            zero means that every activation above zero is active.
        **arguments: `k` of the topk kinds, `prefixes` of matryoshka. Arguments that only training
            needs keep their defaults.
    """
    state = dict(tensors)
    if kind == "jumprelu":
        smallest = torch.finfo(torch.float32).tiny
        state["log_threshold"] = state.pop("threshold").clamp_min(smallest).log()
        arguments["target_l0"] = 1.0  # only training needs it, and the default may exceed d_sae
    d_sae, d_model = state["W_dec"].shape
    sae = KINDS[kind](d_model=d_model, d_sae=d_sae, **arguments, generator=torch.Generator())
    sae.load_state_dict(state)
    return sae.eval()


def as_config(sae: SAE) -> dict[str, Any]:
    """Return `architecture` and `arguments` of a `cfg.json`, without what only training needs."""
    architecture = type(sae)
    arguments: dict[str, Any] = {"d_model": sae.d_model, "d_sae": sae.d_sae}
    if sae.maps is not None:
        bias = "per_layer" if sae.own_biases else "shared"
        arguments |= {"layer_bias": bias, "layer_rank": sae.layer_rank}
    if isinstance(sae, TopK):
        arguments["k"] = sae.k
    if isinstance(sae, Matryoshka):
        arguments["prefixes"] = [size / sae.d_sae for size in sae.sizes]
    if isinstance(sae, JumpReLU):
        arguments["target_l0"] = sae.target_l0
    path = f"{architecture.__module__}.{architecture.__qualname__}"
    return {"architecture": path, "arguments": arguments}


def portable_tensors(sae: SAE) -> Tensors:
    """Return an SAE's tensors in float32 on the CPU; `log_threshold` becomes `threshold`."""
    tensors = {name: tensor.detach().float().cpu() for name, tensor in sae.state_dict().items()}
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    return tensors


def write_tensors(file: Path, tensors: Tensors) -> None:
    """Write a safetensors file that everyone can read (save_file: its owner only)."""
    file.write_bytes(save({name: t.contiguous().clone() for name, t in tensors.items()}))


def their_tensors(ours: Tensors, names: Mapping[str, str], transposed: Sequence[str]) -> Tensors:
    """Return tensors by another library's names; the arguments are those of `our_tensors`."""
    return {
        theirs: (ours[name].T if theirs in transposed else ours[name]).contiguous().clone()
        for name, theirs in names.items()
    }


def our_tensors(
    stored: Tensors,
    names: Mapping[str, str],
    transposed: Sequence[str],
    file: Path,
    *,
    scalars: Sequence[str] = (),
) -> Tensors:
    """Return another library's tensors by our names in float32; the opposite of `their_tensors`.

    `names` are our name -> theirs, `transposed` their names of weights [d_model, d_sae], and
    `scalars` our names of tensors that are one number.

    Raises:
        UserError: a tensor is missing, does not fit the encoder's shape, or is unknown.
    """
    encoder = stored.get(names["W_enc"], torch.empty(0, 0))
    n, d = encoder.T.shape if names["W_enc"] in transposed else encoder.shape
    shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,), **dict.fromkeys(scalars, ())}
    wanted = {theirs: shapes.get(ours, (n,)) for ours, theirs in names.items()}
    wanted |= {theirs: wanted[theirs][::-1] for theirs in transposed if theirs in wanted}
    tensors = take(stored, wanted, file)
    return {
        ours: (tensors[theirs].T if theirs in transposed else tensors[theirs]).contiguous()
        for ours, theirs in names.items()
    }


# ---- exact changes of the weights -----------------------------------------------------------

SCALED = ("b_enc", "b_dec", "b_gate", "b_mag", "threshold")
UNCHANGED = ("W_enc", "W_dec", "r_mag")
ROUNDING = 1e-6  # a decoder row this close to unit norm is left alone
NOTICEABLE = 1e-3


@torch.no_grad()
def fold_norm_factor(sae: SAE, factor: float) -> SAE:
    """Return a copy that takes raw activations, not multiplied by the norm factor.

    With s the factor and z = W_enc (s x - b_dec) + b_enc = s (W_enc (x - b_dec / s) + b_enc / s):
    biases and thresholds are divided by s, and so are the latents; the weights stay, so the
    decoder keeps its unit norm, and TopK chooses the same latents because s > 0.

    Raises:
        UserError: the SAE has a tensor that this does not know.
    """
    folded = copy.deepcopy(sae)
    for name, tensor in folded.state_dict().items():
        if name in SCALED:
            tensor.div_(factor)
        elif name == "log_threshold":
            tensor.sub_(math.log(factor))
        elif name not in UNCHANGED:
            raise UserError(
                f"{type(sae).__name__} has a tensor {name}, and the export does not know how to "
                "fold a norm factor into it: this architecture cannot be exported."
            )
    return folded


def subtract_b_dec(tensors: Tensors, sign: int = 1) -> Tensors:
    """Return the tensors of an SAE that encodes x - b_dec, from those of one that encodes x.

    W x + b = W (x - b_dec) + (b + W b_dec). With sign = -1 the other way round.
    """
    shift = sign * (tensors["W_enc"] @ tensors["b_dec"])
    if "b_mag" not in tensors:
        return {**tensors, "b_enc": tensors["b_enc"] + shift}
    b_mag = tensors["b_mag"] + tensors["r_mag"].exp() * shift
    return {**tensors, "b_gate": tensors["b_gate"] + shift, "b_mag": b_mag}


def unit_decoder(kind: str, tensors: Tensors, *, by_norm: bool = False) -> tuple[Tensors, str]:
    """Return the tensors with decoder rows of unit norm where that changes nothing, and a note.

    A row's norm moves into the latent: exact for relu, jumprelu and gated, and for topk that
    weighs latents by their rows' norms when it chooses. Other topk kinds would choose other
    latents, so their rows are kept. `by_norm`: topk does weigh them so.
    """
    norms = tensors["W_dec"].norm(dim=1)
    norms = torch.where(norms == 0, torch.ones_like(norms), norms)
    deviation = float((norms - 1).abs().max())
    if deviation <= ROUNDING:
        return tensors, ""
    if kind in TOPK_KINDS and not by_norm:
        note = "its decoder rows are kept unchanged, although their norms are not 1 ("
        note += f"{float(norms.min()):.3g} to {float(norms.max()):.3g}): other norms would change "
        return tensors, note + "which latents are active" if deviation > NOTICEABLE else ""
    changed = {**tensors, "W_dec": tensors["W_dec"] / norms.unsqueeze(1)}
    if kind == "gated":
        changed |= {"r_mag": tensors["r_mag"] + norms.log(), "b_mag": tensors["b_mag"] * norms}
    else:
        changed["W_enc"] = tensors["W_enc"] * norms.unsqueeze(1)
        changed["b_enc"] = tensors["b_enc"] * norms
    if kind == "jumprelu":
        changed["threshold"] = tensors["threshold"] * norms
    return changed, "the norms of its decoder rows were folded into its latents"


# ---- reading others' files ------------------------------------------------------------------


def read_pickled(path: Path) -> Any:
    """Return the tensors and plain values of a file that torch.save wrote; no code is run.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch.save did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise missing(path) from None
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path) and "Unsupported" not in str(error):
            raise damaged(path, "torch.save did not write it") from error
        raise UserError(
            f"{path} contains more than tensors. Loading it could run its author's code, so it is "
            "not read. Save only the state dict: torch.save(sae.state_dict(), ...)."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise damaged(path, error) from error


def our_place(config: Mapping[str, Any], file: Path) -> Place | None:
    """Return the place that an export of ours wrote under `groupsae`; None if it did not.

    Raises:
        UserError: the metadata has another version.
    """
    ours = config.get("groupsae")
    if ours is None:
        return None
    if ours["format"] != METADATA_FORMAT:
        raise UserError(
            f"{file} has metadata of groupsae in format {ours['format']!r}, and this version "
            f"reads format {METADATA_FORMAT}: use the version of groupsae that wrote it."
        )
    place = Place(int(ours["layer"]), ours["hookpoint"], ours.get("stack"), str(ours["model"]))
    half = place.hookpoint in HALVES  # (the input of a block is another block's output)
    return place._replace(module=ours.get("module")) if half else place


def our_training_text(folder: Path) -> dict[str, Any]:
    """Return what an export of ours has about its training text: keys of `TRAINED_ON`."""
    for name in ("cfg.json", "config.json"):
        config = read_json(folder / name) or {}
        for holder in (config, config.get("metadata")):
            ours = holder.get("groupsae") if isinstance(holder, dict) else None
            if isinstance(ours, dict):
                return {key: ours[key] for key in TRAINED_ON if ours.get(key) is not None}
    return {}


def unknown_place(folder: Path, name: object, advice: str) -> UserError:
    """Return the error about an SAE of unknown layer or hookpoint, with the way out."""
    known = f"names the SAE's place in the language model as {name!r}, which is not known"
    unknown = "does not name the SAE's layer and hookpoint in the language model"
    return UserError(f"{folder} {unknown if name is None else known}: {advice}.")
