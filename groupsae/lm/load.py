"""A frozen Hugging Face language model."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from groupsae.lm import BUNDLED
from groupsae.lm.blocks import find_blocks
from groupsae.lm.context import within_positions
from groupsae.lm.geometry import Geometry, choose_stack, geometry_of, stacks_of
from groupsae.lm.hooked import HookedLM
from groupsae.lm.hookpoints import paths_of
from groupsae.lm.options import check_load_options, hub_options, recorded_options
from groupsae.lm.tokenizer import FILES as TOKENIZER_FILES
from groupsae.lm.tokenizer import makes_tokens, only_ends
from groupsae.runtime.errors import UserError
from groupsae.runtime.retry import hub_is_unknown, network_cause, one_line


class FrozenLM:
    """A language model that is only run forward.

    Args:
        name: `tiny` (bundled), an id on the Hugging Face Hub, or a folder.
        revision: git revision on the Hub (Pythia: a training step, such as `step1000`); null is
            the newest.
        dtype: dtype of weights and activations, such as `float32` or `bfloat16`.
        hookpoint: activations to read of each block: resid_post, resid_pre, mlp_out or attn_out,
            as `groupsae.lm.hookpoints` defines them.
        stack: `encoder` or `decoder` of a model that has both; null for all others.
        blocks_path: path of the list of blocks, such as `model.layers`; null searches for it.
        submodule: path within a block of attn_out's or mlp_out's module; null searches for it.
        compile: compile the blocks with torch.compile (for attn_out and mlp_out, their parts).
        load: more arguments of transformers' from_pretrained, such as `device_map`,
            `quantization_config`, `attn_implementation`, `trust_remote_code` or `gguf_file` (the
            GGUF file in `name` that config, tokenizer and weights are read from, dequantised).

    Attributes:
        snapshot: folder of the Hub's cache with the commit that is used, named by it: all parts
            come from there, even if the branch moves. None for a folder.

    Raises:
        UserError: the model cannot be found, lacks the stack or the hookpoint, or an option is
            not allowed. Weights are not read to find out.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str | None = None,
        dtype: str = "float32",
        hookpoint: str = "resid_post",
        stack: str | None = None,
        blocks_path: str | None = None,
        submodule: str | None = None,
        compile: bool = False,
        load: dict[str, Any] | None = None,
    ) -> None:
        load = {} if load is None else load
        self.name, self.revision = name, revision
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UserError(f"model.dtype is '{dtype}'; use float32, bfloat16 or float16.")
        check_load_options(load)
        self.dtype, self.hookpoint = found, hookpoint
        self.blocks_path, self.submodule = blocks_path, submodule
        self.compile, self.load_options = compile, load
        self.path = str(BUNDLED.get(name, name))
        self.snapshot: Path | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None  # large ones take seconds to read
        self.config = self._pretrained(AutoConfig, **hub_options(load))
        self.snapshot = self._cached_snapshot()
        self.stack = choose_stack(self.config, stack, name)
        self.geometry = geometry_of(self.config, self.stack, name)
        self.config_json: str = self.config.to_json_string()
        self.modules: list[str] | None = None  # known once the structure is
        self._check_structure()

    @property
    def commit(self) -> str | None:
        """Return the commit of a Hub model that is used; None for a folder."""
        return None if self.snapshot is None else self.snapshot.name

    def _pretrained(self, auto: Any, what: str = "model", **kwargs: Any) -> Any:
        revision = self.commit or self.revision or "main"
        try:
            if not Path(self.path).is_dir() and hub_is_unknown():
                kwargs["local_files_only"] = True  # the Hub's cache, without waiting for it
            return auto.from_pretrained(self.path, revision=revision, **kwargs)
        except Exception as error:
            lost = network_cause(error)
            known = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)
            no_vocabulary = auto is AutoTokenizer and isinstance(error, TypeError)
            gguf = self._gguf()
            unread = gguf is not None and gguf.is_file()  # its reader raises almost anything
            if lost is None and not (isinstance(error, known) or no_vocabulary or unread):
                raise
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            if lost is None and unread:
                raise UserError(
                    f"cannot read {what} from {gguf}: {reason.rstrip('.')}. The file is truncated "
                    "or damaged (compare its SHA-256 with its publisher's), or its architecture "
                    "is unknown to transformers."
                ) from error
            if lost is not None:
                reason += (
                    f" The connection failed ({one_line(lost)}), also in huggingface_hub's own "
                    "retries; downloaded parts are kept, and the same command continues."
                )
            raise UserError(
                f"cannot load {what} '{self.name}' (revision {self.revision or 'main'}): {reason} "
                "Name a folder with a Hugging Face model, or an id on the Hub that this machine "
                "can reach or has cached; model=tiny needs no network."
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's own tokenizer.

        Of a model without tokenizer files it is one that reads no text, for text that is
        tokenised already.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        return self._tokenizer

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase
        try:
            options = hub_options(self.load_options)
            tokenizer = self._pretrained(AutoTokenizer, "the tokenizer of model", **options)
        except UserError:
            if "gguf_file" in self.load_options or self._has_file(*TOKENIZER_FILES):
                raise
        else:
            if makes_tokens(tokenizer) or self._has_file(*TOKENIZER_FILES):
                return tokenizer
        return only_ends(self.config.get_text_config(), self.geometry.vocab_size, self.name)

    def _folder(self) -> Path | None:
        """Return the model's folder; None of a model on the Hub."""
        folder = Path(self.path, str(self.load_options.get("subfolder", "")))
        return folder if folder.is_dir() else None

    def _gguf(self) -> Path | None:
        """Return the GGUF file in the model's folder; None if the model is not read from one."""
        folder, file = self._folder(), self.load_options.get("gguf_file")
        return None if folder is None or file is None else folder / str(file)

    def _has_file(self, *names: str) -> bool:
        """Return whether the model has one of these files, also if the Hub does not answer."""
        folder = self._folder()
        if folder is not None:
            return any((folder / name).exists() for name in names)
        try:
            files = HfApi().list_repo_files(self.name, revision=self.revision)
        except (OSError, ValueError):  # no connection, offline mode, no such repository
            return True
        return any(Path(file).name in names for file in files)

    def _cached_snapshot(self) -> Path | None:
        """Return the folder of the Hub's local cache that the config came from."""
        if self._folder() is not None:
            return None
        config = str(self.load_options.get("gguf_file", "config.json"))
        file = Path(str(self.load_options.get("subfolder", "")), config)
        found = try_to_load_from_cache(
            self.name,
            file.as_posix(),
            cache_dir=self.load_options.get("cache_dir"),
            revision=self.revision or "main",
        )
        return Path(found).parents[len(file.parts) - 1] if isinstance(found, str) else None

    def load(self, device: torch.device) -> HookedLM:
        """Return the model without its head, frozen, on the device."""
        return self._load(AutoModel, device)

    def load_with_head(self, device: torch.device) -> HookedLM:
        """Return the model with its head (an encoder has none), frozen, on the device."""
        if self.stack == "encoder":
            return self.load(device)
        return self._load(self._with_head(), device)

    def load_plain(self, device: torch.device) -> PreTrainedModel:
        """Return the complete model as transformers has it, frozen, on the device.

        With the head for the next token, or for masked ones, if the weights have one.
        """
        return self._weights(self._with_head(), device)

    def _with_head(self) -> Any:
        """Return the auto class that loads the complete model with its head."""
        if len(stacks_of(self.config)) > 1:
            return AutoModelForSeq2SeqLM
        if self.stack == "encoder":
            saved_as = self.config.architectures or []
            masked = any(name.endswith("ForMaskedLM") for name in saved_as)
            return AutoModelForMaskedLM if masked else AutoModel
        known = self.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        remote = "AutoModelForCausalLM" in (getattr(self.config, "auto_map", None) or {})
        return AutoModelForCausalLM if known or remote else AutoModelForImageTextToText

    def _load(self, auto: Any, device: torch.device) -> HookedLM:
        hooked, _ = self._hook(self._weights(auto, device), predicts=auto is not AutoModel)
        if self.compile:
            _compile(hooked)
        return hooked

    def _weights(self, auto: Any, device: torch.device) -> PreTrainedModel:
        options = dict(self.load_options)
        quantised = "quantization_config" in options or hasattr(self.config, "quantization_config")
        if quantised:  # such a model cannot be moved afterwards
            options.setdefault("device_map", {"": str(device)})
        model: Any = self._pretrained(auto, dtype=self.dtype, **options)
        model = model.eval().requires_grad_(False)
        if "device_map" not in options:
            model = model.to(device)
        loaded: PreTrainedModel = model
        return loaded

    def _hook(self, model: Any, predicts: bool) -> tuple[HookedLM, Geometry]:
        hooked, geometry = _hook(
            model,
            self.config,
            self.stack,
            name=self.name,
            hookpoint=self.hookpoint,
            blocks_path=self.blocks_path,
            submodule=self.submodule,
            predicts=predicts,
        )
        self.modules = paths_of(model, hooked.sites)
        return hooked, geometry

    @property
    def start_token(self) -> int | None:
        """Return the decoder's first token in an encoder-decoder model; None for all others.

        Raises:
            UserError: the config does not name it.
        """
        return _start_token(self.config, self.stack, self.name)

    def _check_structure(self) -> None:
        """Find blocks and hookpoint in an empty model, before text is packed or weights are read.

        Raises:
            UserError: one of them does not exist.
        """
        trusted = bool(self.load_options.get("trust_remote_code"))
        try:
            with torch.device("meta"):
                skeleton = AutoModel.from_config(
                    copy.deepcopy(self.config), trust_remote_code=trusted
                )
        except Exception as error:
            if trusted:  # such code may need real tensors: loading shows errors
                return
            raise UserError(
                f"cannot build model '{self.name}' from its config: {type(error).__name__}: "
                f"{str(error).strip() or 'no reason given'}".split("\n")[0]
            ) from error
        _, self.geometry = self._hook(skeleton, predicts=False)

    def described(self) -> dict[str, Any]:
        """Return the options that decide the activations, as plain values; saved with results."""
        return {
            "model": self.name,
            "revision": self.revision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "hookpoint": self.hookpoint,
            "stack": self.stack,
            "blocks_path": self.blocks_path,
            "submodule": self.submodule,
            "modules": self.modules,
            "load": recorded_options(self.load_options),
        }

    def fingerprint(self) -> str:
        """Return a key of config and weights: content for a folder, commit for a Hub model."""
        digest = hashlib.sha256(self.config_json.encode())
        folder = self._folder()
        if folder is not None:
            plain = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
            gguf = self._gguf()
            for file in plain if gguf is None else [gguf]:
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        else:
            digest.update(str(self.commit or self.revision).encode())
            digest.update(self.name.encode())
        digest.update(str(self.dtype).encode())
        loaded = recorded_options(self.load_options)
        if loaded:
            digest.update(json.dumps(loaded, sort_keys=True).encode())
        return digest.hexdigest()


def hook_model(
    model: Any,
    *,
    hookpoint: str = "resid_post",
    stack: str | None = None,
    blocks_path: str | None = None,
    submodule: str | None = None,
) -> tuple[HookedLM, Geometry]:
    """Return a Hugging Face model that the user loaded, as the commands run it, and its sizes.

    The arguments are those of `FrozenLM`. If torch.compile wrapped the model, the original runs.

    Raises:
        UserError: the model lacks the stack, the blocks or the hookpoint.
    """
    model = getattr(model, "_orig_mod", model)
    config, name = getattr(model, "config", None), type(model).__name__
    if not isinstance(config, PreTrainedConfig):
        raise UserError(
            f"the model is {name}, without a config of transformers: give a Hugging Face model, "
            "such as the first result of suite.load_model()."
        )
    chosen = choose_stack(config, stack, name)
    head = getattr(model, "get_output_embeddings", lambda: None)  # a wrapper may have none
    return _hook(
        model,
        config,
        chosen,
        name=name,
        hookpoint=hookpoint,
        blocks_path=blocks_path,
        submodule=submodule,
        predicts=chosen == "decoder" and head() is not None,
    )


def _hook(
    model: Any,
    config: PreTrainedConfig,
    stack: str,
    *,
    name: str,
    hookpoint: str,
    blocks_path: str | None,
    submodule: str | None,
    predicts: bool,
) -> tuple[HookedLM, Geometry]:
    module, geometry = model, geometry_of(config, stack, name)
    if len(stacks_of(config)) > 1:
        module = model.get_encoder() if stack == "encoder" else model.get_decoder()
    if stack == "encoder":
        model = getattr(module, "base_model", module)  # without a head for masked tokens
    hooked = HookedLM(
        model,
        find_blocks(module, geometry.num_layers, blocks_path),
        hookpoint=hookpoint,
        submodule=submodule,
        d_model=geometry.d_model,
        start_token=_start_token(config, stack, name),
        predicts=predicts,
    )
    context = within_positions(geometry.context, hooked.model, hooked.blocks)
    return hooked, replace(geometry, context=context)


def _start_token(config: PreTrainedConfig, stack: str, name: str) -> int | None:
    if len(stacks_of(config)) < 2 or stack != "decoder":
        return None
    text = config.get_text_config(decoder=True)
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    for key in names:
        for each in (config, text):
            if isinstance(token := getattr(each, key, None), int):
                return token
    raise UserError(
        f"{name}: the config does not name the decoder's first token; it has no "
        f"{' and no '.join(names)}. Add one to its config.json."
    )


def _compile(lm: HookedLM) -> None:
    """Compile the modules between the hooks: hooks inside compiled code would not run."""
    for block, site in zip(lm.blocks, lm.sites, strict=True):
        parts = [block]
        if site.module is not block:
            parts = [
                child
                for child in block.children()
                if child is site.module or not any(m is site.module for m in child.modules())
            ]
        for part in parts:
            if not isinstance(part, nn.ModuleList):
                vars(part)["forward"] = torch.compile(part.forward)
