"""Tokens in, activations out: the DataModule that holds the language model."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor
from torch.utils.data import DataLoader

from groupsae.cost.stopwatch import Stopwatch
from groupsae.data.batch import ActivationBatch
from groupsae.data.draws import DrawnTokens, draw
from groupsae.data.exchange import Exchange
from groupsae.data.filters import TokenFilter, check_skip_positions
from groupsae.data.loader import BlockLoader, StepSampler
from groupsae.data.packing import (
    SPLITS,
    Packing,
    Split,
    TokenBlocks,
    document_numbers,
    end_of_text,
    load_token_blocks,
)
from groupsae.data.rows import Show, all_rows, by_model, rows_by_forward
from groupsae.data.sources import Source
from groupsae.data.store.fill import Filler, size_of
from groupsae.data.store.read import RowReader, StoredLoader, read_ahead
from groupsae.data.store.shard import Layout
from groupsae.data.store.store import ActivationStore, Gap, dtype_of, open_store
from groupsae.lm.hooked import HookedLM, read_after
from groupsae.lm.load import FrozenLM
from groupsae.runtime.errors import UserError

LEAST_TEXT = 20_000_000  # tokens
HELDOUT_SEED = 0  # of the sample that all runs are evaluated on


class ActivationDataModule(L.LightningDataModule):
    """Streams activations of a frozen language model, at its hookpoint.

    They come from its `reader`: a `LiveReader` runs the language model on each batch; after
    `keep_in`, a `StoredReader` writes them to disk once and reads them from there.

    Live, token blocks travel through an ordinary loader. What can be decided without the model is
    decided on the host, in `on_before_batch_transfer`; the model runs on the device in
    `on_after_batch_transfer`, one truncated forward for all layers, and only the drawn rows are
    kept. Nothing of it waits for the device, except where stream.max_norm_ratio lets norms decide
    which rows count: then `ActivationBatch.rows` waits for their number.

    The position in the data is one integer, `blocks_seen` over all ranks; order and draws are
    functions of it, so a resumed run sees exactly what the undisturbed one would.

    Args:
        lm: the language model.
        source: source of the text.
        cache: folder for packed tokens.
        context: tokens in a block.
        heldout_fraction: share of the documents that is only evaluated on.
        calibration_fraction: share for layer distances and norm factors.
        prepend_bos: start every block with BOS (the paper does not).
        exclude_special_tokens: leave out rows at BOS, EOS and padding everywhere.
        skip_positions: also leave out the first N positions of each block.
        max_norm_ratio: also leave out rows whose norm is above N times their block's median.
        max_tokens: most text to read; None reads 1.25 times the training budget, at
            least 20 million tokens (so that small budgets share one packed corpus).
        layers_per_token: rows that each token gives to each set of layers, of different layers
            (all of a smaller set).
        blocks_per_step: blocks in an SAE step over all ranks.
        blocks_per_forward: blocks in one forward of the language model; bounds its memory.
        tokens: training budget, tokens per SAE.
        heldout_tokens: tokens of one validation.
        num_workers: loader processes.
        seed: seed of shuffle and layer draws.

    Attributes:
        slots: the sets of layers that training batches draw from.
        exchanges: which process gets which rows, in training and in validation.
        travelling: dtype of rows that are sent to other processes.
        blocks_seen: position in the data, over all ranks.
        device: device for the batches.
        stopwatch: measures the language model's forwards, which make the rows of training.
    """

    def __init__(
        self,
        *,
        lm: FrozenLM,
        source: Source,
        cache: str,
        context: int,
        heldout_fraction: float,
        calibration_fraction: float,
        prepend_bos: bool,
        exclude_special_tokens: bool,
        skip_positions: int,
        max_norm_ratio: float | None,
        max_tokens: int | None,
        blocks_per_step: int,
        blocks_per_forward: int,
        tokens: int,
        heldout_tokens: int,
        num_workers: int,
        seed: int,
        layers_per_token: int = 1,
    ) -> None:
        super().__init__()
        most = lm.geometry.context
        if most is not None and context > most:
            raise UserError(
                f"stream.context is {context}, but {lm.name} reads at most {most} tokens: use "
                f"stream.context={most} or less."
            )
        if tokens < blocks_per_step * context:
            raise UserError(
                f"tokens={tokens:,} is less than one step of stream.blocks_per_step="
                f"{blocks_per_step} blocks of {context} tokens: give at least "
                f"{blocks_per_step * context:,}, or lower the step."
            )
        check_skip_positions(skip_positions, context)
        self.lm, self.source, self.cache = lm, source, Path(cache)
        self.packing = Packing(
            context=context,
            heldout_fraction=heldout_fraction,
            calibration_fraction=calibration_fraction,
            prepend_bos=prepend_bos,
            max_tokens=max(LEAST_TEXT, tokens * 5 // 4) if max_tokens is None else max_tokens,
        )
        self.exclude_special_tokens = exclude_special_tokens
        self.skip_positions, self.max_norm_ratio = skip_positions, max_norm_ratio
        self.blocks_per_step, self.blocks_per_forward = blocks_per_step, blocks_per_forward
        self.heldout_tokens, self.num_workers, self.seed = heldout_tokens, num_workers, seed
        self.layers_per_token = layers_per_token
        self.tokens_per_step = blocks_per_step * context
        self.num_steps = tokens // self.tokens_per_step
        self.travelling = torch.float32
        self.blocks_seen = 0
        self.device = torch.device("cpu")
        self.stopwatch = Stopwatch()
        self._hooked: HookedLM | None = None
        self.live = LiveReader(self)
        self.reader: LiveReader | StoredReader = self.live
        self.set_slots([])

    # ---- the source of activations -----------------------------------------------------

    def keep_in(self, folder: str, dtype: str, say: Callable[[str], object]) -> None:
        """Read activations from a store in this folder, and write missing ones there.

        Then the language model is loaded only when something is missing. Each content has its own
        folder in `folder`; `say` prints a message, in one process of several.
        """
        self.reader = StoredReader(self, folder, dtype, say)

    @property
    def is_stored(self) -> bool:
        """Return whether activations come from a store."""
        return self.reader.stored_dtype is not None

    @property
    def hooked(self) -> HookedLM:
        """Return the language model, loaded if it is not yet."""
        if self._hooked is None:
            self.use(self.lm.load(self.device), self.device)
        assert self._hooked is not None
        return self._hooked

    def use(self, hooked: HookedLM, device: torch.device) -> None:
        """Run this copy of the language model, with or without its head, and no other."""
        self._hooked, self.device = hooked, device

    def release(self) -> None:
        """Drop the language model; it is loaded again when it is needed."""
        self._hooked = None

    def described(self) -> dict[str, Any]:
        """Return all that decides the activations, except weights and text, as plain values."""
        return {
            **self.lm.described(),
            "context": self.packing.context,
            "prepend_bos": self.packing.prepend_bos,
            "exclude_special_tokens": self.exclude_special_tokens,
            "skip_positions": self.skip_positions,
            "max_norm_ratio": self.max_norm_ratio,
            **({"stored": self.reader.stored_dtype} if self.is_stored else {}),
        }

    def split_described(self) -> dict[str, Any]:
        """Return the options of `stream` that decide which text is trained and evaluated on."""
        return {
            **vars(self.packing),
            "exclude_special_tokens": self.exclude_special_tokens,
            "skip_positions": self.skip_positions,
            "max_norm_ratio": self.max_norm_ratio,
            "blocks_per_step": self.blocks_per_step,
            "heldout_tokens": self.heldout_tokens,
        }

    # ---- tokens -------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Pack the tokens once, on one process."""
        self.blocks  # noqa: B018

    def setup(self, stage: str) -> None:
        """Check that every split fills a step; load the model onto this process's device."""
        for split in SPLITS:
            self.steps_for(split, None)
        if self._hooked is None:
            self.device = self.trainer.strategy.root_device if self.trainer else self.device
            if not self.is_stored:
                self.hooked  # noqa: B018

    @cached_property
    def blocks(self) -> TokenBlocks:
        """Return the packed corpus, packing it first if needed."""
        return load_token_blocks(
            self.source,
            self.lm.tokenizer(),
            self.packing,
            self.cache / "tokens",
            vocab_size=self.lm.geometry.vocab_size,
        )

    @property
    def copies(self) -> int:
        """Return how many copies of documents the text lacks."""
        copies: int = self.blocks.manifest["copies"]
        return copies

    def tokens(self, split: Split, blocks: list[int]) -> Int64[Tensor, "block pos"]:
        """Return the tokens of some blocks of a split."""
        return torch.from_numpy(self.blocks.blocks[split][blocks].astype("int64"))

    def epochs(self) -> float:
        """Return how often the training split is read to fill the budget."""
        return self.num_steps * self.blocks_per_step / len(self.blocks.blocks["train"])

    def steps_for(self, split: Split, tokens: int | None) -> int:
        """Return the steps that hold at most `tokens` tokens of a split, at least one.

        Raises:
            UserError: the split has fewer blocks than a step.
        """
        num_blocks = len(self.blocks.blocks[split])
        available = num_blocks // self.blocks_per_step
        if not available:
            packing, train = self.packing, split == "train"
            raise UserError(
                f"the {split} split has {num_blocks} blocks of {packing.context} tokens, less "
                f"than one step of {self.blocks_per_step}; the text has "
                f"{self.blocks.manifest['documents']:,} documents, of which "
                f"stream.heldout_fraction={packing.heldout_fraction:g} and "
                f"stream.calibration_fraction={packing.calibration_fraction:g} are set aside. "
                f"{'Lower both' if train else 'Raise that of this split'}, give more text "
                "(stream.max_tokens), or lower stream.blocks_per_step or stream.context."
            )
        wanted = available if tokens is None else max(1, tokens // self.tokens_per_step)
        return min(available, wanted)

    @property
    def rank(self) -> int:
        """Return the number of this process."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def num_processes(self) -> int:
        """Return how many processes share each step."""
        return self.trainer.world_size if self.trainer else 1

    def steps(
        self, split: Split, num_steps: int, first_step: int = 0, all_ranks: bool = False
    ) -> StepSampler:
        """Return the blocks of each step, this rank's share or those of all ranks.

        Calibration reads the blocks in the order of the file. Held-out blocks are the same sample
        for every run, whatever its seed: the first blocks would be those of a few documents.
        """
        return StepSampler(
            num_blocks=len(self.blocks.blocks[split]),
            blocks_per_step=self.blocks_per_step,
            num_steps=num_steps,
            seed={"train": self.seed, "heldout": HELDOUT_SEED, "calibration": None}[split],
            first_step=first_step,
            rank=0 if all_ranks else self.rank,
            world_size=1 if all_ranks else self.num_processes,
        )

    def training_steps(self) -> StepSampler:
        """Return the blocks of each training step, from `blocks_seen` on."""
        first_step = self.blocks_seen // self.blocks_per_step
        return self.steps("train", self.num_steps, first_step, self.exchanges[0].travels)

    def validation_steps(self) -> StepSampler:
        """Return the blocks of each step of a validation."""
        num_steps = self.steps_for("heldout", self.heldout_tokens)
        return self.steps("heldout", num_steps, 0, self.exchanges[1].travels)

    def loader_of(self, split: Split, steps: StepSampler) -> DataLoader[Tensor]:
        """Return a loader of the tokens of some steps, int64 [block, pos] each."""
        pinned = self.device.type == "cuda"
        return BlockLoader(self.blocks.blocks[split], steps, self.num_workers, pinned)

    def loader(self, split: Split, num_steps: int, first_step: int = 0) -> DataLoader[Tensor]:
        """Return the tokens of this rank's share of some steps."""
        return self.loader_of(split, self.steps(split, num_steps, first_step))

    def heldout_documents(self, num_steps: int) -> Int64[np.ndarray, " block"]:
        """Return a number of the document that each block of held-out steps begins in."""
        return self.documents("heldout")[self.needed("heldout", num_steps)]

    def documents(self, split: Split) -> Int64[np.ndarray, " block"]:
        """Return a number of the document that each block of a split begins in."""
        blocks = self.blocks.blocks[split][:, self.packing.prepend_bos :]
        return document_numbers(blocks, end_of_text(self.lm.tokenizer()))

    def needed(self, split: Split, num_steps: int) -> list[int]:
        """Return the blocks that some steps read over all ranks, in the order of first use."""
        blocks = chain.from_iterable(self.steps(split, num_steps, all_ranks=True))
        return list(islice(blocks, len(self.blocks.blocks[split])))

    # ---- draws --------------------------------------------------------------------------

    @cached_property
    def special_ids(self) -> Int[Tensor, " id"]:
        """Return the tokens that are no text."""
        special, start = self.lm.tokenizer().all_special_ids, self.lm.start_token
        return torch.tensor(special if start is None else [*special, start], dtype=torch.int64)

    @property
    def filters(self) -> TokenFilter:
        """Return which tokens count."""
        special = self.special_ids if self.exclude_special_tokens else None
        return TokenFilter(special, self.skip_positions, self.max_norm_ratio)

    def counted(self, tokens: Int[Tensor, "block pos"]) -> Bool[Tensor, "block pos"] | None:
        """Return which tokens count regardless of their activations; None if all do."""
        return self.filters.tokens(read_after(self.lm.start_token, tokens))

    def set_slots(self, groups: list[list[int]]) -> None:
        """Choose the sets of layers that training batches draw from."""
        self.slots = groups
        validation = Exchange([_each_layer(self.used_layers())])
        self.exchanges = Exchange([self.each_row(groups)]), validation

    def rows_per_token(self, layers: Sequence[int]) -> int:
        """Return how many rows each token gives to a set of layers."""
        return min(self.layers_per_token, len(layers))

    def each_row(self, slots: list[list[int]]) -> list[list[int]]:
        """Return each set of layers as often as a token gives it a row."""
        return [slot for slot in slots for _ in range(self.rows_per_token(slot))]

    def used_layers(self) -> list[int]:
        """Return every layer that some slot draws from, sorted."""
        return sorted({layer for slot in self.slots for layer in slot})

    def exchange(self, training: Exchange, validation: Exchange) -> None:
        """Send rows to the processes that need them, in training and in validation."""
        self.exchanges = training, validation
        self.travelling = self.reader.travelling()

    def drawn(
        self,
        tokens: Int[Tensor, "block pos"],
        exchange: Exchange,
        first_position: int = 0,
        part: slice = slice(None),
    ) -> DrawnTokens:
        """Return the draws for tokens on the host; the arguments are those of `draws.draw`."""
        drawn = draw(
            tokens,
            exchange,
            self.counted,
            seed=self.seed,
            first_position=first_position,
            blocks_per_forward=self.blocks_per_forward,
            part=part,
        )
        return drawn.pinned() if self.device.type == "cuda" else drawn

    def draw_step(self, tokens: Int[Tensor, "block pos"], first_block: int) -> DrawnTokens:
        """Return the draws for a training batch; `first_block` is the step's place in the run."""
        exchange = self.exchanges[0]
        if not exchange.travels:  # these are this rank's tokens only
            first_block += self.rank * len(tokens)
        return self.drawn(tokens, exchange, first_block * self.packing.context)

    def draw_parts(
        self, tokens: Int[Tensor, "block pos"], exchange: Exchange
    ) -> list[DrawnTokens]:
        """Return a batch in parts of `blocks_per_forward`, for slots of one layer each."""
        share, size = len(tokens) // len(exchange.wanted), self.blocks_per_forward
        starts = range(0, share, size)
        return [self.drawn(tokens, exchange, part=slice(i, i + size)) for i in starts]

    # ---- Lightning's hooks --------------------------------------------------------------

    def train_dataloader(self) -> Iterable[Any]:
        """Return the training batches from `blocks_seen` on."""
        return self.reader.training()

    def val_dataloader(self) -> Iterable[Any]:
        """Return the held-out batches of a validation."""
        return self.reader.validation()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Decide on the host which rows a batch shows."""
        return self.reader.prepare(batch)

    def on_after_batch_transfer(
        self, batch: Any, dataloader_idx: int
    ) -> ActivationBatch | Iterator[ActivationBatch]:
        """Return a training batch's activations, or a validation batch's part by part.

        A validation batch shows every used layer, so its parts are made one after the other.
        """
        assert self.trainer is not None
        if not self.trainer.training:
            return (self.reader.rows(part.to(self.device)) for part in batch)
        self.blocks_seen += self.blocks_per_step
        self.stopwatch.start(self.device)
        rows = self.reader.rows(batch)
        self.stopwatch.stop()
        return rows

    # ---- activations outside of training ------------------------------------------------

    def activations(
        self, tokens: Int[Tensor, "block pos"], slots: list[list[int]], first_position: int = 0
    ) -> ActivationBatch:
        """Return the rows of tokens for sets of layers, by the language model.

        `first_position` is the place of the first token in the run; it decides the draws.
        """
        drawn = self.drawn(tokens.cpu(), Exchange([self.each_row(slots)]), first_position)
        return self.live.rows(drawn.to(self.device))

    def every_layer(
        self, tokens: Int[Tensor, "block pos"], layers: list[int]
    ) -> Iterator[ActivationBatch]:
        """Yield all activations of `layers`, one slot each, `blocks_per_forward` at a time."""
        for part in tokens.split(self.blocks_per_forward):
            yield self.activations(part, _each_layer(layers))

    def calibration_batches(self, tokens: int) -> Iterator[ActivationBatch]:
        """Yield every layer's activations over this rank's share of the calibration split."""
        num_steps = self.steps_for("calibration", tokens)
        reader = self.reader if self.reader.has_calibration(num_steps) else self.live
        exchange = Exchange([_each_layer(range(self.lm.geometry.num_layers))])
        for blocks in self.steps("calibration", num_steps):
            for part in reader.parts("calibration", blocks, exchange):
                yield reader.rows(part.to(self.device))

    def first_rows(self, slots: list[list[int]], num_blocks: int) -> Callable[[], ActivationBatch]:
        """Return what makes the first rows of training, of at most so many blocks, for a trial."""
        blocks = next(iter(self.steps("train", 1)))[:num_blocks]

        def rows() -> ActivationBatch:
            drawn = self.drawn(self.tokens("train", blocks), Exchange([self.each_row(slots)]))
            return self.reader.rows(self.reader.read("train", blocks, drawn).to(self.device))

        return rows

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and the identity of that data."""
        return {
            "blocks_seen": self.blocks_seen,
            "tokens_key": self.blocks.key,
            "seconds": self.stopwatch.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            UserError: the text has changed since.
        """
        if state_dict["tokens_key"] != self.blocks.key:
            raise UserError(
                f"this run was trained on packed text {state_dict['tokens_key']}, but data now "
                f"gives {self.blocks.key}: the source, tokenizer or packing has changed. Start "
                "a new run, or bring back the old text."
            )
        self.blocks_seen = state_dict["blocks_seen"]
        self.stopwatch.seconds = state_dict["seconds"]


class LiveReader:
    """Runs the language model on the batches of tokens. `StoredReader` has the same methods.

    Attributes:
        stored_dtype: dtype on disk; None without a store.
        fill_seconds: seconds spent on filling the store.
    """

    stored_dtype: str | None = None
    fill_seconds = 0.0

    def __init__(self, data: ActivationDataModule) -> None:
        self.data = data

    def training(self) -> Iterable[Tensor]:
        """Return the training batches from `blocks_seen` on, for Lightning."""
        return self.data.loader_of("train", self.data.training_steps())

    def validation(self) -> Iterable[Tensor]:
        """Return the batches of a validation, for Lightning."""
        return self.data.loader_of("heldout", self.data.validation_steps())

    def prepare(self, batch: Tensor) -> DrawnTokens | list[DrawnTokens]:
        """Return a batch's draws on the host; in validation, in parts."""
        data = self.data
        assert data.trainer is not None
        if data.trainer.training:
            return data.draw_step(batch, data.blocks_seen)
        return data.draw_parts(batch, data.exchanges[1])

    def read(self, split: Split, blocks: list[int], drawn: DrawnTokens) -> DrawnTokens:
        """Return drawn tokens with their rows, where those are stored."""
        return drawn

    def parts(self, split: Split, blocks: list[int], exchange: Exchange) -> Iterable[DrawnTokens]:
        """Return a batch in parts of `blocks_per_forward`, as `read` does."""
        return self.data.draw_parts(self.data.tokens(split, blocks), exchange)

    @torch.no_grad()
    def rows(self, drawn: DrawnTokens) -> ActivationBatch:
        """Return the rows of tokens that are on the device.

        Memory is tokens x slots x d_model. Rows that travel are sent forward by forward, each
        next to the following forward.
        """
        lm, filters, exchange = self.data.hooked, self.data.filters, drawn.exchange
        show, device = by_model(lm, drawn.tokens), drawn.tokens.device

        def empty(tokens: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(len(exchange.sent), tokens, lm.d_model, dtype=dtype, device=device)

        if not exchange.travels:
            acts = empty(drawn.tokens.numel(), torch.float32)
            parts = iter([all_rows(show, filters, drawn, acts)])
        else:
            dtype = self.data.travelling
            parts = rows_by_forward(
                show, filters, drawn, lambda where: empty(where.stop - where.start, dtype)
            )
        return drawn.batch(*exchange.collect(parts))

    def travelling(self) -> torch.dtype:
        """Return the narrowest dtype that holds the used layers' rows, by running two tokens."""
        data, dtypes = self.data, list[torch.dtype]()
        show = by_model(data.hooked, data.tokens("train", [0])[:, :2].to(data.device))
        show(slice(None), data.used_layers(), lambda _, acts: dtypes.append(acts.dtype))
        return functools.reduce(torch.promote_types, dtypes)

    def has_calibration(self, num_steps: int) -> bool:
        """Return whether every layer of this many calibration steps can be read."""
        return True

    def fill_calibration(self, tokens: int) -> None:
        """Write missing calibration tokens into the store."""

    def fill_training(self) -> None:
        """Write missing activations for training and validation into the store."""


class StoredReader:
    """Reads activations from a store that it fills first. `LiveReader` has the same methods.

    The language model is loaded only when something is missing in the store.
    """

    def __init__(
        self, data: ActivationDataModule, folder: str, dtype: str, say: Callable[[str], object]
    ) -> None:
        self.data, self.folder, self.say = data, Path(folder), say
        self.stored_dtype: str | None = dtype
        self.fill_seconds = 0.0

    @cached_property
    def store(self) -> ActivationStore:
        """Return the store of this text and model, opened; the text is packed first if needed.

        Raises:
            UserError: its folder cannot be written.
        """
        lm, blocks = self.data.lm, self.data.blocks
        # names of models and folders do not matter: the fingerprint identifies the weights
        read = ("dtype", "hookpoint", "stack", "blocks_path", "submodule", "load")
        described = lm.described()
        content = {key: described[key] for key in read}
        content |= {"weights": lm.fingerprint(), "text": blocks.key}
        assert self.stored_dtype is not None
        layout = Layout(
            self.data.packing.context, lm.geometry.d_model, dtype_of(self.stored_dtype)
        )
        sizes = {split: len(tokens) for split, tokens in blocks.blocks.items()}
        return open_store(self.folder, content, layout, sizes)

    def training(self) -> StoredLoader:
        """Return the training batches from `blocks_seen` on, read ahead with their rows."""
        data, steps = self.data, self.data.training_steps()
        share = data.exchanges[0].share

        def batches() -> Iterator[DrawnTokens]:
            reader = self._row_reader("train")

            def read(item: tuple[int, list[int]]) -> DrawnTokens:
                step, blocks = item
                first_block = step * data.blocks_per_step
                drawn = data.draw_step(data.tokens("train", blocks), first_block)
                return reader.read(blocks[share(len(blocks))], drawn)

            return read_ahead(enumerate(steps, steps.first_step), read)

        return StoredLoader(len(steps), batches)

    def validation(self) -> StoredLoader:
        """Return the batches of a validation; their parts are read when they are used."""
        steps, exchange = self.data.validation_steps(), self.data.exchanges[1]
        return StoredLoader(
            len(steps), lambda: (self.parts("heldout", blocks, exchange) for blocks in steps)
        )

    def prepare(self, batch: Any) -> Any:
        """Return the batch: all was decided when it was read."""
        return batch

    def read(self, split: Split, blocks: list[int], drawn: DrawnTokens) -> DrawnTokens:
        """Return drawn tokens with their rows."""
        return self._row_reader(split).read(blocks, drawn)

    def parts(self, split: Split, blocks: list[int], exchange: Exchange) -> Iterator[DrawnTokens]:
        """Yield a batch in parts of `blocks_per_forward`, read ahead with their rows."""
        reader, size = self._row_reader(split), self.data.blocks_per_forward
        drawn = self.data.draw_parts(self.data.tokens(split, blocks), exchange)
        mine = blocks[exchange.share(len(blocks))]
        pieces = [mine[i : i + size] for i in range(0, len(mine), size)]
        return read_ahead(zip(pieces, drawn, strict=True), lambda part: reader.read(*part))

    def rows(self, drawn: DrawnTokens) -> ActivationBatch:
        """Return the rows of tokens that are on the device, with their stored rows."""
        assert drawn.stored is not None
        return drawn.batch(*drawn.exchange.collect([drawn.stored]))

    def travelling(self) -> torch.dtype:
        """Return the dtype of the store."""
        return self.store.layout.dtype

    def has_calibration(self, num_steps: int) -> bool:
        """Return whether every layer of this many calibration steps is stored."""
        every = range(self.data.lm.geometry.num_layers)
        return not self.store.gaps(
            "calibration", self.data.needed("calibration", num_steps), every
        )

    def _row_reader(self, split: Split) -> RowReader:
        return RowReader(
            self.store,
            split,
            self.data.filters,
            blocks_per_forward=self.data.blocks_per_forward,
            threads=max(1, self.data.num_workers),
            pinned=self.data.device.type == "cuda",
        )

    def fill_calibration(self, tokens: int) -> None:
        """Write every layer of this many calibration tokens, if missing.

        Raises:
            UserError: the disk has no room for them and for what training needs afterwards.
        """
        data, store = self.data, self.store
        store.refresh()  # other runs may have written since
        every = list(range(data.lm.geometry.num_layers))
        blocks = data.needed("calibration", data.steps_for("calibration", tokens))
        # the grouping may leave the last layer out, no other
        later = sum(size_of(gap, store.layout) for gap in self._training_gaps(every[:-1] or every))
        self._fill(store.gaps("calibration", blocks, every), later)

    def fill_training(self) -> None:
        """Write missing activations for training and validation of the chosen slots.

        Raises:
            UserError: the disk has no room for it.
        """
        self.store.refresh()
        self._fill(self._training_gaps(self.data.used_layers()), 0)

    def _training_gaps(self, layers: list[int]) -> list[Gap]:
        train = self.data.needed("train", self.data.num_steps)
        heldout = self.data.needed("heldout", len(self.data.validation_steps()))
        return [
            *self.store.gaps("train", train, layers),
            *self.store.gaps("heldout", heldout, layers),
        ]

    def _fill(self, gaps: list[Gap], later: int) -> None:
        if not gaps:
            return
        began, data = time.perf_counter(), self.data

        def model(split: Split, blocks: Sequence[int]) -> Show:
            return by_model(data.hooked, data.tokens(split, list(blocks)).to(data.device))

        Filler(
            self.store,
            model,
            share=data.blocks_per_step // data.num_processes,
            blocks_per_forward=data.blocks_per_forward,
            rank=data.rank,
            processes=data.num_processes,
            say=self.say,
        ).fill(gaps, later)
        data.release()
        self.fill_seconds += time.perf_counter() - began


def _each_layer(layers: Iterable[int]) -> list[list[int]]:
    """Return a slot for each layer."""
    return [[layer] for layer in layers]
