"""The pass over text against brute force: the same contexts, counts and records, bit for bit."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from groupsae.interpretation.collect import Kept, SAECollector, stream_of
from groupsae.interpretation.contexts import EMPTY, Held, drawn, value_of
from groupsae.interpretation.firings import (
    WINDOW,
    Peaks,
    entries_of,
    firings_of,
    windows_in,
)
from groupsae.interpretation.statistics import BINS
from groupsae.interpretation.text import TEXTS, Part, document_bounds
from groupsae.sae.topk import TopK
from groupsae.suite.suite import Suite

LAYERS, CONTEXT, D_MODEL, D_SAE, END = [1, 2, 4], 80, 6, 24, 0
KEPT = Kept(top=4, sample=6, across=3, latents=5, seed=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def suite() -> Suite:
    sae = TopK(d_model=D_MODEL, d_sae=D_SAE, k=3, generator=torch.Generator().manual_seed(0))
    factors = {str(layer): 1.0 + layer / 4 for layer in LAYERS}
    return Suite({"g": sae}, {"g": {"layers": LAYERS, "norm_factors": factors}})


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Tokens of 24 blocks, activations on each layer, which count, and the blocks to explain."""
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 30, (24, CONTEXT), generator=draws)
    acts = torch.randn(len(LAYERS), tokens.numel(), D_MODEL, generator=draws)
    acts[:, ::7] = acts[:, 1::7][:, : acts[:, ::7].shape[1]]  # equal activations: ties
    keep = torch.rand(len(LAYERS), tokens.numel(), generator=draws) > 0.1
    return tokens, acts, keep, 14


def collect(suite, text, folder, sizes, which=lambda _: True, collector=None) -> SAECollector:
    """Return the collector after parts of these numbers of blocks."""
    tokens, acts, keep, explain = text
    if collector is None:
        collector = SAECollector("g", suite, KEPT, folder, CPU)
        collector.records.truncate({})
    block = number = 0
    while block < len(tokens):
        stop = min(block + sizes[number % len(sizes)], len(tokens))
        if block < explain:
            stop = min(stop, explain)
        part = Part(number, int(block >= explain), block * CONTEXT, tokens[block:stop])
        rows = slice(block * CONTEXT, stop * CONTEXT)
        if which(number):
            found = {}
            for i, layer in enumerate(LAYERS):
                latents = suite.encode_sparse(acts[i, rows], layer)
                entries = [entries_of(latents, keep[i, rows], 0)]
                found[layer] = firings_of(entries, part.tokens.numel())
            collector.update(part, found, document_bounds(part.tokens, END))
        block, number = stop, number + 1
    return collector


def brute_force(suite, text):
    """Return z by layer, and the peak of each (layer, latent, window), with plain loops."""
    tokens, acts, keep, _ = text
    dense = {}
    for i, layer in enumerate(LAYERS):
        z = suite.encode(acts[i], layer)
        dense[layer] = (z * keep[i].unsqueeze(1)).numpy()
    peaks = defaultdict(dict)
    for layer in LAYERS:
        for latent in range(D_SAE):
            for block in range(len(tokens)):
                for w in range(windows_in(CONTEXT)):
                    first = block * CONTEXT + w * WINDOW
                    last = min(first + WINDOW, (block + 1) * CONTEXT)
                    z = dense[layer][first:last, latent]
                    if z.max() > 0:
                        peaks[layer, latent][block * windows_in(CONTEXT) + w] = (
                            float(z.max()),
                            first + int(z.argmax()),
                        )
    return dense, peaks


@pytest.fixture(scope="module")
def collected(suite, text, tmp_path_factory) -> SAECollector:
    return collect(suite, text, tmp_path_factory.mktemp("records"), [4])


@pytest.fixture(scope="module")
def expected(suite, text):
    return brute_force(suite, text)


def test_counts_sums_and_histograms_are_those_of_brute_force(collected, expected, text):
    dense, peaks = expected
    boundary = text[3] * CONTEXT
    for layer in LAYERS:
        found = collected.statistics[layer]
        for index, z in enumerate((dense[layer][:boundary], dense[layer][boundary:])):
            assert found.fired[index].tolist() == (z > 0).sum(0).tolist()
            torch.testing.assert_close(
                found.mass[index].double() * 2.0**-28,
                torch.from_numpy(z.sum(0)).double(),
                rtol=1e-5,
                atol=1e-6,
            )
        per_text = text[3] * windows_in(CONTEXT)
        for latent in range(D_SAE):
            numbers = peaks[layer, latent]
            assert found.windows[0, latent] == sum(n < per_text for n in numbers)
            z = dense[layer][:, latent]
            z = z[z > 0]
            if not len(z):
                continue
            end = 2.0 ** int(found.exponent[latent])
            assert end / 2 <= z.max() < end
            counts, _ = np.histogram(z, np.linspace(0, end, BINS + 1))
            assert found.histogram[latent].tolist() == counts.tolist()


def test_the_highest_contexts_and_the_samples_are_those_of_brute_force(collected, expected, text):
    _, peaks = expected
    boundary = text[3] * windows_in(CONTEXT)
    for layer in LAYERS:
        top = collected.contexts["top", layer].held
        stream = stream_of(KEPT.seed, "g", layer)
        for latent in range(D_SAE):
            found = peaks[layer, latent]
            best = sorted(found.values(), key=lambda peak: (-peak[0], peak[1]))[: KEPT.top]
            held = top.peaks[latent][top.keys[latent] < EMPTY]
            assert held.tolist() == [place for _, place in best]
            assert value_of(top.keys[latent])[: len(best)].tolist() == [
                pytest.approx(value, abs=0) for value, _ in best
            ]
            for text_number, name in enumerate(TEXTS):
                sample = collected.contexts[name, layer].held
                inside = [w for w in found if (w >= boundary) == bool(text_number)]
                one = torch.tensor([latent] * len(inside))
                windows = torch.tensor(inside, dtype=torch.int64)
                keys = drawn(stream, Peaks(one.long(), windows, windows, windows), 0).tolist()
                order = [w for _, w in sorted(zip(keys, inside, strict=True))][: KEPT.sample]
                held = sample.peaks[latent][sample.keys[latent] < EMPTY].tolist()
                assert held == [found[w][1] for w in order]


def test_contexts_stay_inside_their_document_and_show_its_activations(collected, expected, text):
    dense, _ = expected
    tokens = text[0].flatten().numpy()
    checked = 0
    for layer in LAYERS:
        for kind in ("top", *TEXTS):
            found = Held(*(x.flatten(0, 1) for x in collected.contexts[kind, layer].held))
            for i, peak in enumerate(found.peaks.tolist()):
                if peak < 0:
                    continue
                start, length = peak - int(found.before[i]), int(found.lengths[i])
                assert start // CONTEXT == (start + length - 1) // CONTEXT  # one block
                assert END not in tokens[start : start + length - 1]  # one document
                assert start <= peak < start + length
                z = dense[layer][start : start + length, i // (len(found.peaks) // D_SAE)]
                np.testing.assert_array_equal(
                    found.acts[i, 0, :length].numpy(), z.astype(np.float16)
                )
                assert not found.acts[i, 0, length:].any()
                document = [start - 1, start + length]
                full = length == WINDOW or all(
                    p // CONTEXT != peak // CONTEXT or tokens[p if p < start else p - 1] == END
                    for p in document
                )
                assert full  # shorter only where the document is
                checked += 1
    assert checked > 500


def test_a_context_across_layers_shows_every_layer(collected, expected):
    dense, peaks = expected
    contexts = collected.across.held
    found = Held(*(x.flatten(0, 1) for x in contexts))
    for latent in range(D_SAE):
        best: dict[int, tuple[float, int]] = {}
        for layer in LAYERS:
            for window, (value, place) in peaks[layer, latent].items():
                if window not in best or (-value, place) < (-best[window][0], best[window][1]):
                    best[window] = value, place
        order = sorted(best.values(), key=lambda peak: (-peak[0], peak[1]))[: KEPT.across]
        held = contexts.peaks[latent][contexts.keys[latent] < EMPTY].tolist()
        assert held == [place for _, place in order]
        for rank, peak in enumerate(held):
            i = latent * KEPT.across + rank
            start, length = peak - int(found.before[i]), int(found.lengths[i])
            for row, layer in enumerate(LAYERS):
                z = dense[layer][start : start + length, latent]
                np.testing.assert_array_equal(
                    found.acts[i, row, :length].numpy(), z.astype(np.float16)
                )


def test_records_hold_every_firing_of_the_chosen_latents(collected, expected):
    dense, _ = expected
    chosen = collected.candidates.sort().values.numpy()
    assert len(chosen) == 2 * KEPT.latents
    for layer in LAYERS:
        rows, z = collected.records.sorted_rows(layer), dense[layer]
        latents, places = z.T[chosen].nonzero()
        assert rows["position"].tolist() == places.tolist()
        assert rows["latent"].tolist() == chosen[latents].tolist()
        np.testing.assert_array_equal(
            rows["act"], z[rows["position"], rows["latent"]].astype("f2")
        )


@pytest.mark.parametrize("sizes", [[1], [24], [3, 1, 5]])
def test_the_result_does_not_depend_on_the_size_of_the_parts(
    suite, text, collected, sizes, tmp_path
):
    other = collect(suite, text, tmp_path, sizes).state()
    assert all(torch.equal(other[name], value) for name, value in collected.state().items())


def test_two_processes_find_what_one_finds(suite, text, collected, tmp_path):
    halves = [
        collect(suite, text, tmp_path / str(i), [2], lambda n, i=i: n % 2 == i) for i in (0, 1)
    ]
    halves[0].merge(halves[1])
    assert all(torch.equal(halves[0].state()[n], v) for n, v in collected.state().items())
    for layer in LAYERS:
        rows = (each.records.sorted_rows(layer) for each in (halves[0], collected))
        np.testing.assert_array_equal(*rows)


def test_a_loaded_state_continues_as_if_nothing_had_happened(suite, text, collected, tmp_path):
    first = collect(suite, text, tmp_path / "a", [2], lambda n: n < 5)
    fresh = collect(suite, text, tmp_path / "b", [2], lambda _: False)
    fresh.load(first.state())
    collect(suite, text, tmp_path / "b", [2], lambda n: n >= 5, fresh)
    assert all(torch.equal(fresh.state()[n], v) for n, v in collected.state().items())


def test_a_sample_is_uniform_over_the_windows(suite):
    """chi^2 over the windows that 2,000 seeds draw; its 99.9 % quantile at 49 degrees is 85.4."""
    windows = torch.arange(50)
    counts = np.zeros(50)
    for seed in range(2000):
        keys = drawn(stream_of(seed, "g", 1), Peaks(windows * 0, windows, windows, windows), 0)
        counts[keys.argsort()[:5].numpy()] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 85.4
