"""Writes the latents' dashboards: an HTML page that needs no server and no network."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from groupsae.files.atomic import atomic_write, explain_write_errors
from groupsae.interpretation.bands import bands_of
from groupsae.interpretation.files import CollectedSAE, Interpretation, LatentContexts
from groupsae.interpretation.firings import WINDOW
from groupsae.interpretation.sharing import badge_of, labels_needed, transfer
from groupsae.interpretation.text import TEXTS

CHUNK = 64  # latents in a piece of data that is read when one of them is opened
MOST_INLINE = 50_000_000  # bytes of a page; more goes into files next to it


def shown_of(sae: CollectedSAE) -> tuple[int, int, int]:
    """Return how many contexts a page shows: across layers, of the top, and of each band.

    They are more for an SAE of one layer, whose page has only that one.
    """
    return (0, 10, 2) if len(sae.layers) == 1 else (4, 4, 1)


class Label(NamedTuple):
    """A latent's explanation."""

    text: str  # by rules
    score: float | None = None  # its F1; None: not scored
    badge: str = ""  # for its drift
    # who else explained it, the explanation, and its scores in words
    judged: tuple[tuple[str, str, str], ...] = ()
    # what its page shows of the rules and of how layers share it
    detail: Mapping[str, Any] | None = None


Labels = Mapping[tuple[str, int], Label]


def labels_of(found: Interpretation) -> dict[tuple[str, int], Label]:
    """Return the labels of all explained latents, by SAE and number."""
    more: dict[tuple[str, int], list[tuple[str, str, str]]] = {}
    for one in found.judged:
        for name, sae in one["saes"].items():
            for row in sae["latents"]:
                words = _scores_in_words(row["judge"], one["qualification"]["qualified"])
                entry = (str(one["judge"]["name"]), str(row["explanation"]), words)
                more.setdefault((name, row["latent"]), []).append(entry)
    return {
        (name, row["latent"]): Label(
            row["all"]["text"],
            row["all"]["scores"]["f1"],
            badge_of([pair["kind"] for pair in row["sharing"]["pairs"]]),
            tuple(more.get((name, row["latent"]), ())),
            _detail(row, sae["layers"]),
        )
        for name, sae in found.explanations.items()
        for row in sae["latents"]
    }


def _detail(row: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Return a latent's rules by where they were made, transfers, and kinds of pairs of layers."""
    several = len(layers) > 1
    made = {"all": row["all"]} if several else {}
    made |= row["layers"]
    tau = transfer(row, layers, [*layers, "all"])
    return {
        "made": [
            [place, each["text"], *_short(each["scores"][k] for k in ("f1", "null_f1"))]
            for place, each in made.items()
        ],
        "token": row["all"]["scores"]["unigram_auprc"],
        "tau": [[_or_none(value) for value in line] for line in tau] if several else [],
        "labels": labels_needed(row, layers) if several else None,
        "pairs": [
            [*pair["layers"], pair["kind"], *_short([pair["drift"]]), _or_none(pair.get("q"))]
            for pair in row["sharing"]["pairs"]
        ],
    }


def _or_none(value: float | None) -> float | None:
    """Return a number with three digits; None where there is none."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.3g}")


def _scores_in_words(scores: Mapping[str, Any], qualified: bool) -> str:
    """Return F1 at the natural rate of each task; no numbers of a judge that is not qualified."""
    if not qualified:
        return "no scores: the judge is not qualified"
    parts = []
    for task, found in scores.items():
        own, null = (found[side]["f1"] for side in ("own", "null"))
        if own is not None and null is not None:
            parts.append(f"{task} F1 {own:.2f} (null {null:.2f})")
    return ", ".join(parts) or "no scores: no answer could be read"


def write_page(found: Interpretation, title: str) -> Path:
    """Write `index.html`; return its path.

    A page of more than 50 MB gets its data from `data/*.js` next to it, read when needed.

    Raises:
        UserError: it cannot be written.
    """
    labels = labels_of(found)
    saes = [_sae_index(found, sae, labels) for sae in found.saes.values()]
    index, pieces = _index(found, title, saes, found.strings), list(_pieces(found, labels))
    inline = sum(len(text) for _, text in pieces) < MOST_INLINE
    index["inline"] = inline
    page = found.folder / "index.html"
    with explain_write_errors(page, "interpret a copy of the run"):
        for old in (found.folder / "data").glob("*.js"):
            old.unlink()
        if not inline:
            (found.folder / "data").mkdir(exist_ok=True)
            for name, text in pieces:
                file = found.folder / "data" / f"{name}.js"
                file.write_text(f"piece({_js(name)},{text})", encoding="utf-8")
    html = render(index, pieces if inline else [])
    with atomic_write(page, "w", encoding="utf-8") as handle:
        handle.write(html)
    return page


def one_latent(found: Interpretation, name: str, latent: int, layer: int | None = None) -> str:
    """Return the page of one latent alone, as HTML, opened at a layer (None: its main one)."""
    labels, sae, place = labels_of(found), found.saes[name], latent // CHUNK
    piece = _piece(found, sae, _kept(sae), range(latent, latent + 1), labels)
    tokens, needed = set[int](), {latent, *(int(other) for other, _ in piece[0]["near"])}
    entry = _sae_index(found, sae, labels)
    for key in ("peaks", "label", "score", "badge"):
        entry[key] = {str(other): entry[key][other] for other in needed}
    for key in ("rate", "max"):
        entry[key] = [{str(latent): values[latent]} for values in entry[key]]
    for contexts in _kept(sae):
        for start, length in zip(contexts.starts[latent], contexts.lengths[latent], strict=True):
            tokens |= set(found.tokens[start : start + length].tolist()) if start >= 0 else set()
    tokens |= {token for peaks in entry["peaks"].values() for token in peaks if token >= 0}
    tokens |= {int(token) for token, _ in piece[0]["up"] + piece[0]["down"]}
    index = _index(found, f"{name}, latent {latent}", [entry], tokens)
    index |= {"only": [name, latent, layer], "inline": True}
    return render(index, [(f"{name}.{place}", _js([None] * (latent % CHUNK) + piece))])


def render(index: Mapping[str, Any], pieces: Sequence[tuple[str, str]]) -> str:
    """Return the page with its data."""
    environment = Environment(
        loader=PackageLoader("groupsae.interpretation"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("index.html.jinja").render(
        title=index["title"],
        index=Markup(_js(index)),
        pieces=[(name, Markup(text)) for name, text in pieces],
        script=Markup(_asset(environment, "page.js")),
        style=Markup(_asset(environment, "page.css")),
    )


def _index(
    found: Interpretation, title: str, saes: Sequence[Mapping[str, Any]], tokens: Iterable[int]
) -> dict[str, Any]:
    """Return all that the list of latents needs, with the text of some tokens."""
    head = found.head
    return {
        "title": title,
        "model": head["model"],
        "hookpoint": head["hookpoint"],
        "tokens": found.num_tokens,
        "context": found.context,
        "window": WINDOW,
        "chunk": CHUNK,
        "wide": max(found.strings) > 65535,
        "strings": {str(token): found.strings[token] for token in tokens},
        "saes": saes,
    }


def _sae_index(found: Interpretation, sae: CollectedSAE, labels: Labels) -> dict[str, Any]:
    total = sum(found.num_tokens)
    rates = np.stack([sae.fired(layer).sum(0) / total for layer in sae.layers])
    highest = np.stack([sae.contexts("top", layer).values[:, 0] for layer in sae.layers])
    named = [labels.get((sae.name, latent)) for latent in range(sae.d_sae)]
    return {
        "name": sae.name,
        "layers": sae.layers,
        "d_sae": sae.d_sae,
        "shown": list(shown_of(sae)),
        "rate": [_short(row) for row in rates],
        "max": [_short(row) for row in highest],
        "peaks": _peak_tokens(found, sae).tolist(),
        "label": [None if each is None else each.text for each in named],
        "score": [None if each is None else each.score for each in named],
        "badge": ["" if each is None else each.badge for each in named],
        "judged": {str(i): each.judged for i, each in enumerate(named) if each and each.judged},
    }


def _peak_tokens(found: Interpretation, sae: CollectedSAE) -> np.ndarray:
    """Return the 3 commonest tokens at the peaks of each latent's contexts, -1 where fewer."""
    peaks = np.concatenate(
        [sae.contexts(kind, layer).peaks for kind in TEXTS for layer in sae.layers], axis=1
    )
    tokens = np.where(peaks >= 0, found.tokens[peaks.clip(0)], -1)
    common = np.full((sae.d_sae, 3), -1)
    for latent, row in enumerate(tokens):
        values, counts = np.unique(row[row >= 0], return_counts=True)
        order = np.lexsort((values, -counts))[:3]
        common[latent, : len(order)] = values[order]
    return common


def _pieces(found: Interpretation, labels: Labels) -> Iterator[tuple[str, str]]:
    for sae in found.saes.values():
        kept = _kept(sae)
        for number, first in enumerate(range(0, sae.d_sae, CHUNK)):
            latents = range(first, min(first + CHUNK, sae.d_sae))
            yield f"{sae.name}.{number}", _js(_piece(found, sae, kept, latents, labels))


def _kept(sae: CollectedSAE) -> list[LatentContexts]:
    """Return all contexts: across layers, and of each layer the top and two samples."""
    kinds = ("top", *TEXTS)
    of_layers = [sae.contexts(kind, layer) for layer in sae.layers for kind in kinds]
    return [sae.contexts("across"), *of_layers]


def _piece(
    found: Interpretation,
    sae: CollectedSAE,
    kept: Sequence[LatentContexts],
    latents: range,
    labels: Labels,
) -> list[Any]:
    """Return what the pages of some latents need beyond the index."""
    rows = slice(latents.start, latents.stop)
    across, most, each_band = shown_of(sae)
    lists = [_taken(kept[0], rows, across)]
    for top, *samples in zip(kept[1::3], kept[2::3], kept[3::3], strict=True):
        lists.append(_taken(top, rows, most))
        found_here = [_taken(sample, rows) for sample in samples]
        lists.append(bands_of(found_here, each_band).contexts)
    histograms = [sae.histogram(layer) for layer in sae.layers]
    about = sae.directions
    pieces: list[Any] = []
    for row, latent in enumerate(latents):
        highest = max(max(float(c.values[row].max(initial=0.0)) for c in lists), 1e-9)
        blob = b"".join(_packed(found, contexts, row, highest) for contexts in lists)
        label = labels.get((sae.name, latent))
        pieces.append(
            {
                "near": _pairs(about.nearest[latent], about.cosines[latent]),
                "up": _pairs(about.promoted[latent], about.promoted_by[latent]),
                "down": _pairs(about.suppressed[latent], about.suppressed_by[latent]),
                "max": _short([highest])[0],
                "hist": [counts[latent].tolist() for counts, _ in histograms],
                "end": _short([ends[latent] for _, ends in histograms]),
                "contexts": base64.b64encode(blob).decode(),
                "explained": None if label is None else label.detail,
            }
        )
    return pieces


def _taken(contexts: LatentContexts, rows: slice, count: int | None = None) -> LatentContexts:
    return LatentContexts(*(each[rows, :count] for each in contexts))


def _packed(found: Interpretation, contexts: LatentContexts, row: int, highest: float) -> bytes:
    """Return one latent's contexts as bytes, in the order that page.js reads.

    Number of contexts; for each: position of its first token (uint32), tokens before the peak,
    number of tokens, activations of each layer and token as shares of the latent's highest one
    (1 to 255, 0: silent), and the token ids (uint16, uint32 for large vocabularies).
    """
    kept = [i for i, peak in enumerate(contexts.peaks[row]) if peak >= 0]
    blob = bytearray([len(kept)])
    wide = "<u4" if max(found.strings) > 65535 else "<u2"
    for i in kept:
        start, length = int(contexts.starts[row, i]), int(contexts.lengths[row, i])
        acts = contexts.acts[row, i, :, :length].astype(np.float32)
        shares = np.where(acts > 0, np.clip(np.rint(acts / highest * 255), 1, 255), 0)
        blob += np.array([start], "<u4").tobytes()
        blob += bytes([int(contexts.peaks[row, i]) - start, length])
        blob += shares.astype(np.uint8).tobytes()
        blob += found.tokens[start : start + length].astype(wide).tobytes()
    return bytes(blob)


def _pairs(ids: np.ndarray, values: np.ndarray) -> list[list[float]]:
    return [[int(i), v] for i, v in zip(ids, _short(values), strict=True)]


def _short(values: Iterable[float] | np.ndarray) -> list[float]:
    """Return numbers with four significant digits: enough to show, and half the size."""
    return [float(f"{value:.4g}") for value in values]


def _js(value: Any) -> str:
    """Return a value as JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
