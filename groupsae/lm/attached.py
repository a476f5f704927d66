"""Hooks in a Hugging Face model that the user loaded and runs: a head, PEFT, a cache, padding."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from groupsae.lm.hookpoints import with_positions
from groupsae.runtime.compat import compiles_hooks
from groupsae.runtime.errors import UserError

if TYPE_CHECKING:
    from groupsae.lm.geometry import Geometry

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """What a forward reads: the inputs of the stack of blocks.

    Attributes:
        shape: batch and pos.
        tokens: ids; None if the model was given embeddings.
        mask: True for text, False for padding; None if no mask with a row for each text was given.
        past: number of positions in the KV cache, before these.
        continues: whether that cache holds what the last forward read.
    """

    shape: tuple[int, int]
    tokens: Int[Tensor, "batch pos"] | None
    mask: Bool[Tensor, "batch pos"] | None
    past: int
    continues: bool


Visit = Callable[[int, Float[Tensor, "batch pos d_model"], Reading | None], Tensor | None]


class AttachedLM:
    """A model that the user runs, with the hookpoint at which SAEs were trained.

    The blocks are found as for training, whatever surrounds them (a head, the wrappers of PEFT).

    Args:
        model: any Hugging Face model, with or without its head.
        recorded: an SAE's `cfg.json`; of `FrozenLM.described`, those keys that it has.
        d_model: width of the activations.
        highest: the highest layer with an SAE.

    Raises:
        UserError: the model has another depth or width, or lacks the hookpoint.
    """

    def __init__(
        self, model: nn.Module, recorded: Mapping[str, Any], d_model: int, highest: int
    ) -> None:
        from groupsae.lm.load import hook_model  # slow, and there already: the model is one of its

        self.hookpoint = recorded.get("hookpoint") or "resid_post"
        self.d_model, self.name = d_model, type(model).__name__
        self._from_encoder = recorded.get("stack") == "encoder"
        place = {key: recorded.get(key) for key in ("stack", "blocks_path", "submodule")}
        found, size = hook_model(model, hookpoint=self.hookpoint, **place)
        check_fits(recorded, d_model, highest, size, self.name)
        self.blocks, self.sites, self.context = found.blocks, found.sites, size.context
        self._names = {module: name for name, module in model.named_modules()}
        self._model = model
        # every module that is called on the way to the blocks: the outermost comes first
        self._callers = {
            module: list(inspect.signature(module.forward).parameters)
            for module in self._around(self.blocks)
            if not isinstance(module, nn.ModuleList)
        }
        self._reading: Reading | None = None
        self._reader: nn.Module | None = None  # the outermost module in this forward
        self._cache: Any = None  # of the last forward
        self._held = 0  # positions in it afterwards
        self._ran = False

    @contextmanager
    def hooked(self, layers: Iterable[int], visit: Visit, given: T) -> Iterator[T]:
        """Call `visit(layer, acts, reading)` in every forward while inside; yield what is given.

        The activations are in the model's dtype; a tensor that it returns replaces them. The
        reading is None where a block is called outside of a forward of the model. Hooks of
        several blocks act in the order in which the blocks were entered.

        Raises:
            UserError: the model was compiled in one piece with the hookpoint; in a forward: it
                reads more than its context, or the hookpoint has another shape.
        """
        wanted = sorted(set(layers))
        self._check_compiled(wanted)
        handles: list[RemovableHandle] = []
        try:
            for module in self._callers:
                handles.append(module.register_forward_pre_hook(self._read, with_kwargs=True))
                handles.append(module.register_forward_hook(self._forget, always_call=True))
            for layer in wanted:
                handles.append(self.sites[layer].watch(partial(self._see, visit, layer)))
            with _generating_uncompiled(self._callers):
                yield given
        finally:
            for handle in handles:
                handle.remove()
        if not self._ran:
            warnings.warn(
                f"the hooked layers of this {self.name} did not run inside the block, so nothing "
                "was seen or changed: run the model that was given to it.",
                stacklevel=3,  # of the user's `with`
            )

    def _see(self, visit: Visit, layer: int, acts: Tensor) -> Tensor | None:
        self._ran, reading = True, self._reading
        batch, pos = acts.shape[:2] if reading is None or acts.ndim > 2 else reading.shape
        if reading is not None and reading.shape != (batch, pos):  # the model adds positions
            reading = self._reading = replace(reading, shape=(batch, pos), tokens=None, mask=None)
        where = f"{self.hookpoint} of block {layer} of {self.name}"
        found = with_positions(acts, (batch, pos), self.d_model, where)
        with torch.autocast(acts.device.type, enabled=False):  # SAEs compute in their own dtype
            replaced = visit(layer, found, reading)
        return None if replaced is None else replaced.reshape(acts.shape)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a module on the way to the blocks was given.

        A text model within a multimodal one gets embeddings and finished masks; then the tokens
        and the mask of the outer one hold.
        """
        names = self._callers[module]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        part = "decoder_" if "decoder_input_ids" in names and not self._from_encoder else ""
        tokens, embedded = given.get(f"{part}input_ids"), given.get(f"{part}inputs_embeds")
        shown: Tensor | None = embedded if tokens is None else tokens
        if shown is None:
            return
        batch, pos = shown.shape[:2]
        outer = self._reading
        if outer is None:
            self._reader = module
        elif outer.shape != (batch, pos):
            outer = None
        if outer is not None:
            past, continues = outer.past, outer.continues
        else:
            past, continues = self._past(given.get("past_key_values", given.get("cache_params")))
        if self.context is not None and past + pos > self.context:
            raise UserError(
                f"the text has {past + pos} tokens, but {self.name} reads at most {self.context}: "
                f"shorten it, with tokenizer(..., truncation=True, max_length={self.context}) or "
                "a smaller max_new_tokens."
            )
        mask = given.get(f"{part}attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            mask = mask[:, -pos:].bool()
        else:
            mask = None if outer is None else outer.mask
        if tokens is None and outer is not None:
            tokens = outer.tokens
        self._reading = Reading((batch, pos), tokens, mask, past, continues)

    def _past(self, cache: Any) -> tuple[int, bool]:
        """Return how many positions a cache holds, and whether the last forward read them."""
        same, before = cache is self._cache, self._cache
        self._cache = cache
        try:
            past = 0 if cache is None else int(cache.get_seq_length())
        except (AttributeError, ValueError):  # Mamba's does not know
            past = self._held if same else 0
        # without a cache before, it is the one that the last forward made
        return past, past > 0 and (same or (before is None and past == self._held))

    def _forget(self, module: nn.Module, *_: Any) -> None:
        if module is self._reader and self._reading is not None:
            self._held = self._reading.past + self._reading.shape[1]
            self._reading = None

    def _around(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that a module of the model is in, the model first."""
        parts = self._names[module].split(".")
        return [self._model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]

    def _check_compiled(self, layers: Iterable[int]) -> None:
        for layer in layers:
            module = self.sites[layer].module
            around = self._around(module)
            if any(compiles_hooks(each, outside=each is not module) for each in (*around, module)):
                raise UserError(
                    f"{self.name} was compiled in one piece with block {layer}, and hooks inside "
                    "compiled code may not run: give the model as it was before torch.compile, "
                    "and run that one (of a compiled model that is model._orig_mod)."
                )


def check_fits(
    recorded: Mapping[str, Any], d_model: int, highest: int, size: "Geometry", name: str
) -> None:
    """Raise UserError if a model cannot be the one that SAEs up to a layer were trained on."""
    depth = len(recorded.get("modules") or ()) or max(highest + 1, size.num_layers)
    if (depth, d_model) != (size.num_layers, size.d_model):
        raise UserError(
            f"the SAEs were trained on {recorded.get('model') or 'a model'} with {depth} layers "
            f"of width {d_model}, but {name} has {size.num_layers} of width {size.d_model}: give "
            "the model that they were trained on."
        )


@contextmanager
def _generating_uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let `generate` run the model as it is while inside.

    With a static cache on a GPU it compiles the model for the steps after the first, and hooks
    inside compiled code may not run.
    """
    models = [module for module in modules if hasattr(module, "get_compiled_call")]
    before = [vars(model).get("get_compiled_call") for model in models]
    try:
        for model in models:
            vars(model)["get_compiled_call"] = partial(_as_it_is, model)
        yield
    finally:
        for model, method in zip(models, before, strict=True):
            vars(model).pop("get_compiled_call", None)
            if method is not None:
                vars(model)["get_compiled_call"] = method


def _as_it_is(model: nn.Module, _config: Any) -> Any:
    return model.__call__
