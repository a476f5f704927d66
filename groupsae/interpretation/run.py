"""The pass over text: runs the model, feeds the collectors, stops and resumes, joins processes."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from groupsae.data.activations import ActivationDataModule
from groupsae.data.filters import both
from groupsae.data.packing import end_of_text
from groupsae.files.atomic import atomic_write, explain_write_errors, write_json
from groupsae.files.reading import read_json, require_json
from groupsae.files.tensors import read_tensors
from groupsae.interpretation.collect import Kept, SAECollector, candidates
from groupsae.interpretation.firings import Entries, entries_of, firings_of
from groupsae.interpretation.records import Records
from groupsae.interpretation.text import Part, Text, document_bounds
from groupsae.runtime.signals import Stopped
from groupsae.suite.suite import Suite

SAVE_EVERY = 600.0  # seconds between saved states
SORTED = 100  # bytes of a firing while its part is sorted, as benchmarks.interpretation found
DIRECTIONS = 8  # random ones, with which latents are compared


@dataclass(frozen=True)
class Process:
    """Which of several processes this is."""

    rank: int = 0
    count: int = 1


class Pass:
    """One process's share of the pass over a text, for the SAEs of a run.

    Every process reads each `count`-th part. What it has found lies in `folder` when it is saved,
    and a pass with the same key resumes from there.

    Args:
        folder: `interpretation/collecting` of the run.
        key: what the result depends on, as a hash.
        data: the stream of the run, with its model.
        text: the parts to read.
        saes: SAEs by name, each alone.
        kept: how much to keep of each latent.
        process: which of several processes this is.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        data: ActivationDataModule,
        text: Text,
        saes: Mapping[str, Suite],
        kept: Kept,
        process: Process,
    ) -> None:
        self.folder, self.key, self.data, self.text = folder, key, data, text
        self.saes, self.kept = saes, kept
        self.process, self.next_part = process, process.rank
        self.layers = sorted({layer for suite in saes.values() for layer in suite.layers})
        self.collectors = {name: self._collector(name, process.rank) for name in saes}
        draws = torch.Generator().manual_seed(0)
        directions = torch.randn(DIRECTIONS, data.hooked.d_model, generator=draws)
        self.directions = F.normalize(directions, dim=1).to(data.device)

    def _collector(self, name: str, rank: int) -> SAECollector:
        suite, device = self.saes[name], self.data.device
        d_sae = suite.saes[name].d_sae
        latents = candidates(self.kept, name, d_sae).to(device)
        records = Records(self.folder / "records" / name, latents, d_sae, str(rank))
        return SAECollector(name, suite, self.kept, records, device)

    def needs(self, tokens: int) -> tuple[int, int]:
        """Return the bytes of memory and of files that all parts need, once `tokens` were read.

        Memory is for contexts, counts, and the firings of a part, which are sorted together.
        """
        contexts = sum(
            self.kept.bytes_for(suite.saes[name].d_sae, len(suite.layers))
            for name, suite in self.saes.items()
        )
        layers = [each for found in self.collectors.values() for each in found.layers.values()]
        fired = sum(int(layer.statistics.fired.sum()) for layer in layers) / tokens
        records = sum(f.stat().st_size for f in self.folder.glob("records/*/*.bin")) / tokens
        records += 2 * DIRECTIONS * len(self.layers)
        part = min(self.text.size * self.text.context, max(self.text.tokens))
        return (
            contexts + round(SORTED * fired * part),
            contexts + round(records * sum(self.text.tokens)),
        )

    def run(self, advance: Callable[[int], object], stopped: Callable[[], int | None]) -> None:
        """Read the parts that are left; `advance` gets the tokens of each.

        Raises:
            Stopped: `stopped` returned the number of a signal. The state has been saved.
        """
        saved = time.monotonic()
        for part in self.text.parts(self.next_part, self.process.count):
            self.update(part)
            self.next_part = part.number + self.process.count
            advance(part.tokens.numel())
            signal = stopped()
            if signal is not None or time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
            if signal is not None:
                raise Stopped(signal)
        self.save()

    @torch.no_grad()
    def update(self, part: Part) -> None:
        """Run the model on a part, and add what the latents do there."""
        data, tokens = self.data, part.tokens.to(self.data.device)
        entries: dict[tuple[str, int], list[Entries]] = defaultdict(list)
        read = data.hooked.read(tokens)
        counted = data.filters.tokens(read)
        for start in range(0, len(tokens), data.blocks_per_forward):
            blocks = slice(start, start + data.blocks_per_forward)

            def visit(layer: int, acts: Tensor, blocks: slice = blocks) -> None:
                acts = acts.to(data.device, torch.float32)
                here = None if counted is None else counted[blocks]
                keep = both(here, data.filters.activations(acts))
                keep = None if keep is None else keep.flatten()
                rows, first = acts.flatten(0, 1), blocks.start * tokens.shape[1]
                self._project(layer, rows, keep, part.first + first)
                for name, suite in self.saes.items():
                    if layer in suite.layers:
                        latents = suite.encode_sparse(rows, layer)
                        entries[name, layer].append(entries_of(latents, keep, first))

            inputs = data.hooked.inputs(tokens[blocks])
            data.hooked.run(inputs, self.layers, visit, stop=True)
        bounds = document_bounds(read, end_of_text(data.lm.tokenizer()))
        for name, collector in self.collectors.items():
            found = {
                layer: firings_of(entries.pop((name, layer)), tokens.numel())
                for layer in collector.layers
            }
            collector.update(part, found, bounds)

    def _project(self, layer: int, rows: Tensor, keep: Tensor | None, first: int) -> None:
        """Write a layer's activations along random directions, at their place in the text."""
        found = rows @ self.directions.T
        if keep is not None:
            found[~keep] = -torch.inf
        file = os.open(self.folder / f"random.layer.{layer}.bin", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, found.half().cpu().numpy().tobytes(), first * 2 * DIRECTIONS)
        finally:
            os.close(file)

    # ---- state --------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state; a kill while writing leaves the one before."""
        rank = self.process.rank
        for name, collector in self.collectors.items():
            with atomic_write(self._file(name, self.next_part, rank)) as handle:
                handle.write(save({k: v.contiguous().cpu() for k, v in collector.state().items()}))
        sizes = {n: c.records.sizes(c.layers) for n, c in self.collectors.items()}
        head = {"key": self.key, "count": self.process.count, "next_part": self.next_part}
        write_json(self.folder / f"process.{rank}.json", {**head, "records": sizes})
        for old in self.folder.glob(f"*.{rank}.*.safetensors"):
            if old.name.split(".")[-2] != str(self.next_part):
                old.unlink()

    def resume(self) -> bool:
        """Take over a saved state of the same pass, and return whether there was one."""
        found = read_json(self.folder / f"process.{self.process.rank}.json") or {}
        same = (found.get("key"), found.get("count")) == (self.key, self.process.count)
        for name, collector in self.collectors.items():
            with explain_write_errors(self.folder, "interpret a copy of the run"):
                sizes = found["records"][name] if same else dict.fromkeys(collector.layers, 0)
                collector.records.truncate({int(layer): size for layer, size in sizes.items()})
            if same:
                self._load(collector, found["next_part"], self.process.rank)
        if same:
            self.next_part = found["next_part"]
        return same

    def join(self) -> None:
        """Add what the other processes have saved."""
        for rank in range(1, self.process.count):
            head = require_json(self.folder / f"process.{rank}.json")
            for name, collector in self.collectors.items():
                other = self._collector(name, rank)
                self._load(other, head["next_part"], rank)
                collector.merge(other)

    def _load(self, collector: SAECollector, part: int, rank: int) -> None:
        tensors = read_tensors(self._file(collector.name, part, rank))
        collector.load({k: v.to(self.data.device) for k, v in tensors.items()})

    def _file(self, name: str, part: int, rank: int) -> Path:
        return self.folder / f"{name}.{rank}.{part}.safetensors"
