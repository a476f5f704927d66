"""The pass over text: runs the model, feeds the collectors, stops and resumes."""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from groupsae.data.activations import ActivationDataModule
from groupsae.data.filters import both
from groupsae.data.packing import end_of_text
from groupsae.files.atomic import atomic_write, explain_write_errors, write_json
from groupsae.files.reading import read_json
from groupsae.files.tensors import read_tensors
from groupsae.interpretation.collect import Kept, SAECollector
from groupsae.interpretation.firings import Entries, entries_of, firings_of
from groupsae.interpretation.text import Part, Text, document_bounds
from groupsae.runtime.signals import Stopped
from groupsae.suite.suite import Suite

SAVE_EVERY = 600.0  # seconds between saved states
# bytes while a part is added, fitted to four sizes: d_sae 512 to 4096, k 16 to 64, 1 to 3 SAEs
FIRED, PEAK = 12, 170  # of a firing, of all SAEs; of a latent in a window, of the largest SAE
DIRECTIONS = 8  # random ones, with which latents are compared


class Pass:
    """One process's share of the pass over a text, for the SAEs of a run: every `count`-th part.

    What it has found lies in `folder` when it is saved, and a pass with the same key resumes from
    there. The key is a hash of what the result depends on; each of `saes`, by name, is alone.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        data: ActivationDataModule,
        text: Text,
        saes: Mapping[str, Suite],
        kept: Kept,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self.folder, self.key, self.data, self.text = folder, key, data, text
        self.saes, self.kept, self.count, self.next_part = saes, kept, count, rank
        self.own = folder / str(rank)  # the files of this process
        self.layers = sorted({layer for suite in saes.values() for layer in suite.layers})
        self.collectors = {
            name: SAECollector(name, suite, kept, self.own / "records" / name, data.device)
            for name, suite in saes.items()
        }
        draws = torch.Generator().manual_seed(0)
        directions = torch.randn(DIRECTIONS, data.hooked.d_model, generator=draws)
        self.directions = F.normalize(directions, dim=1).to(data.device)

    def trial(self) -> tuple[float, int, int]:
        """Return the seconds of all parts, and bytes of memory and disk, from two forwards."""
        self.resume()
        part = next(self.text.parts())
        part = part._replace(tokens=part.tokens[: self.data.blocks_per_forward])
        self.update(part)  # the first forward is slower than those that follow
        began = time.perf_counter()
        self.update(part)
        seconds, tokens = time.perf_counter() - began, part.tokens.numel()
        return seconds * sum(self.text.tokens) / tokens, *self.needs(2 * tokens)

    def needs(self, tokens: int) -> tuple[int, int]:
        """Return the bytes of memory and of files that all parts need, once `tokens` were read.

        Memory is for contexts, counts, and the firings of a part, which are sorted together.
        """
        contexts = fired = peaks = records = 0
        for collector in self.collectors.values():
            contexts += sum(tensor.nbytes for tensor in collector.state().values())
            counts = collector.statistics.values()
            fired += sum(int(each.fired.sum()) for each in counts)
            peaks = max(peaks, sum(int(each.windows.sum()) for each in counts))
            records += sum(collector.records.sizes().values())
        each = records / tokens + 2 * DIRECTIONS * len(self.layers)
        part = min(self.text.size * self.text.context, max(self.text.tokens))
        return (
            contexts + round((FIRED * fired + PEAK * peaks) / tokens * part),
            contexts + round(each * sum(self.text.tokens)),
        )

    def run(self, advance: Callable[[int], object], stopped: Callable[[], int | None]) -> None:
        """Read the parts that are left; `advance` gets the tokens of each.

        Raises:
            Stopped: `stopped` returned the number of a signal. The state has been saved.
        """
        saved = time.monotonic()
        for part in self.text.parts(self.next_part, self.count):
            self.update(part)
            self.next_part = part.number + self.count
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
        for name, collector in self.collectors.items():
            with atomic_write(self._file(name, self.next_part)) as handle:
                handle.write(save({k: v.contiguous().cpu() for k, v in collector.state().items()}))
        sizes = {name: collector.records.sizes() for name, collector in self.collectors.items()}
        head = {"key": self.key, "count": self.count, "next_part": self.next_part}
        write_json(self.own / "state.json", {**head, "records": sizes})
        for old in self.own.glob("*.safetensors"):
            if old.name.split(".")[-2] != str(self.next_part):
                old.unlink()

    def resume(self) -> bool:
        """Take over a saved state of the same pass, and return whether there was one."""
        found = read_json(self.own / "state.json") or {}
        same = (found.get("key"), found.get("count")) == (self.key, self.count)
        with explain_write_errors(self.own, "interpret a copy of the run"):
            if not same:
                shutil.rmtree(self.own, ignore_errors=True)
            for name, collector in self.collectors.items():
                collector.records.truncate(found["records"][name] if same else {})
        if same:
            self.next_part = found["next_part"]
            for name, collector in self.collectors.items():
                collector.load(read_tensors(self._file(name, self.next_part)))
        return same

    def join(self) -> None:
        """Add what the other processes have saved."""
        for rank in range(1, self.count):
            other = Pass(
                self.folder, self.key, self.data, self.text, self.saes, self.kept, rank, self.count
            )
            other.resume()
            for name, collector in self.collectors.items():
                collector.merge(other.collectors[name])

    def _file(self, name: str, part: int) -> Path:
        return self.own / f"{name}.{part}.safetensors"
