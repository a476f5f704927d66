"""What a format of another library is to the program, and what is known of an SAE in it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from groupsae import __version__
from groupsae.interop.fold import Tensors, unit_decoder
from groupsae.interop.names import module_path
from groupsae.lm.hookpoints import HOOKPOINTS
from groupsae.runtime.errors import UserError
from groupsae.sae.base import SAE
from groupsae.suite.build import build
from groupsae.suite.tensors import section

FORMAT = 1  # of what we write into others' free metadata


@dataclass(frozen=True, kw_only=True)
class About:
    """Where an exported SAE comes from: goes into the format's free metadata.

    Attributes:
        group: name of the SAE in its run, such as `layers.3-5`.
        layers: that it was trained on.
        layer: that this copy of it is for.
        norm_factor: that was folded into its biases.
        hookpoint: resid_post, resid_pre, mlp_out or attn_out.
        model: name of the language model.
        revision: of the model, on the Hub.
        dtype: the model ran in.
        context: tokens in a block.
        prepend_bos: whether blocks began with BOS.
        stack: encoder or decoder.
        module: path in the bare Hugging Face model of the module that puts this out; None of
            what goes into the first block, or if it is not known.
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

    @classmethod
    def of(cls, group: str, layer: int, config: dict[str, Any]) -> "About":
        """Return what a `cfg.json` of ours says of one of its layers."""
        hookpoint = config.get("hookpoint", "resid_post")
        return cls(
            group=group,
            layers=list(config["layers"]),
            layer=layer,
            norm_factor=float(config["norm_factors"][str(layer)]),
            hookpoint=hookpoint,
            model=str(config.get("model", "unknown")),
            revision=config.get("revision"),
            dtype=config.get("dtype"),
            context=config.get("context"),
            prepend_bos=bool(config.get("prepend_bos", False)),
            stack=config.get("stack"),
            module=module_path(hookpoint, layer, config.get("modules")),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a model that lies in a folder goes by the folder's name."""
        model = Path(self.model).name if Path(self.model).is_absolute() else self.model
        return {"format": FORMAT, "groupsae": __version__, **asdict(self), "model": model}


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """An SAE read from a folder, ready for our own format.

    Attributes:
        folder: where it was found.
        format: that it was read as.
        sae: it works on activations times the norm factor.
        arguments: of its constructor.
        norm_factors: layer that it serves -> factor.
        hookpoint: whose activations it takes.
        stack: encoder or decoder, if the folder names it.
        model: that the folder names, if any.
        notes: sentences for the user.
    """

    folder: Path
    format: str
    sae: SAE
    arguments: dict[str, Any]
    norm_factors: dict[int, float]
    hookpoint: str
    stack: str | None = None
    model: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """Return the layers that it serves."""
        return list(self.norm_factors)

    @classmethod
    def of(
        cls,
        kind: str,
        tensors: Tensors,
        *,
        sized: dict[str, Any],
        by_norm: bool = False,
        notes: Sequence[str] = (),
        **place: Any,
    ) -> "Incoming":
        """Return the SAE of these tensors, its decoder rows of unit norm where that is exact.

        Args:
            kind: of SAE.
            tensors: with our names and shapes.
            sized: what `build` asks for beside them.
            by_norm: see `unit_decoder`.
            notes: sentences for the user, beside the one on the decoder's norms.
            **place: the other attributes.
        """
        tensors, note = unit_decoder(kind, tensors, by_norm=by_norm)
        sae, arguments = build(kind, tensors, **sized)
        told = [each for each in (note, *notes) if each]
        return cls(sae=sae, arguments=arguments, notes=told, **place)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One library's folder for an SAE.

    Attributes:
        name: as `format=` names it.
        library: what the Hub calls the library.
        holds: kinds of SAE -> what the format calls them.
        folder: name of an SAE's folder.
        write: an SAE on raw activations into an existing folder.
        mine: whether a folder is of this format.
        read: the SAE in such a folder.
    """

    name: str
    library: str
    holds: dict[str, str]
    folder: Callable[[About], str]
    write: Callable[[Path, SAE, About], None]
    mine: Callable[[Path], bool]
    read: Callable[[Path], Incoming]


class Known(NamedTuple):
    """What metadata of ours in another library's folder says of an SAE."""

    layer: int
    hookpoint: str
    stack: str | None
    model: str


def known_place(config: dict[str, Any], file: Path) -> Known | None:
    """Return what we wrote into a format's free metadata; None if the folder is not of ours.

    Args:
        config: that may hold it under `groupsae`.
        file: it comes from, for messages.

    Raises:
        UserError: it is of another version, or names no place in a language model.
    """
    known = section(config, "groupsae", file)
    if not known:
        return None
    if known.get("format") != FORMAT:
        raise UserError(
            f"{file} has metadata of groupsae of format {known.get('format')!r}, and this version "
            f"reads {FORMAT}: use the version that wrote it."
        )
    layer, hookpoint, stack = (known.get(key) for key in ("layer", "hookpoint", "stack"))
    if type(layer) is not int or layer < 0 or hookpoint not in HOOKPOINTS:
        raise UserError(
            f"{file} has metadata of groupsae with layer = {layer!r} and hookpoint = "
            f"{hookpoint!r}: a layer from 0 on and one of {', '.join(HOOKPOINTS)} are expected."
        )
    return Known(layer, str(hookpoint), stack, str(known.get("model")))


def wrong_place(folder: Path, named: object, advice: str) -> UserError:
    """Return the error of a folder that does not say which layer it is for, and the way out."""
    return UserError(
        f"{folder} does not say which layer of a language model it is for (found {named!r}): "
        f"{advice}."
    )
