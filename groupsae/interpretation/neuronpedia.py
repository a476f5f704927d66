"""Neuronpedia's import folder of a layer: `<model>/<source>/`, a source for each layer.

Four files of one line (`release.jsonl`, `model.jsonl`, `sourceset.jsonl`, `source.jsonl`) whose
keys must be columns of a table, and `features/`, `activations/` and `explanations/` with
`batch-<n>.jsonl.gz`. The importer takes the columns of a batch from its first line, fails on an
empty file, and fills in the times itself. Source: `apps/webapp/lib/db/import.ts` and
`prisma/schema.prisma` of github.com/hijohnnylin/neuronpedia.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from groupsae.interop.saelens import config_of
from groupsae.interpretation.features import LayerFeatures

LONGEST = 512  # UTF-16 units of an explanation
SHARED = (  # columns that are called as in SAEDashboard
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
    "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
    "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip
Row = dict[str, Any]


def model_id(layer: LayerFeatures) -> str:
    """Return the id of the language model: its name without the owner, in lower case."""
    return re.sub(r"[^\w.-]", "-", layer.model.rpartition("/")[2].lower())


def source_id(layer: LayerFeatures) -> str:
    """Return the id of a layer's source, such as `4-groupsae-res-16k__layers-3-5`."""
    return f"{layer.origin.layer}-{layer.set}__{layer.suffix}"


def folder_name(layer: LayerFeatures) -> str:
    """Return the path of a layer's folder."""
    return f"{model_id(layer)}/{source_id(layer)}"


def write(folder: Path, layer: LayerFeatures) -> None:
    """Write the latents of a layer; those that do not fire have no activations."""
    for name, row in metadata(layer).items():
        (folder / f"{name}.jsonl").write_text(_line(row))
    for number, latents in enumerate(layer.batches([*range(layer.sae.d_sae)])):
        found = [layer.feature(latent) for latent in latents]
        tables = {
            "features": [_feature(layer, each) for each in found],
            "activations": [row for each in found for row in _activations(layer, each)],
            "explanations": [row for latent in latents for row in _explanations(layer, latent)],
        }
        for name, rows in tables.items():
            if rows:  # the importer fails on an empty file
                (folder / name).mkdir(exist_ok=True)
                _write(folder / name / f"batch-{number}.jsonl.gz", rows)


def metadata(layer: LayerFeatures) -> dict[str, Row]:
    """Return the rows of the four tables that a source stands on, by name of the file."""
    names, origin, model = layer.names, layer.origin, model_id(layer)
    release = names.release or f"groupsae-{model}"
    about = f"Group-SAEs of {layer.model}: one SAE for each group of similar layers"
    rows: dict[str, Row] = {
        "release": {
            "name": release,
            "description": about,
            "creatorName": names.creator_name,
            "urls": [],
        },
        "model": {
            "id": model,
            "displayName": layer.model,
            "owner": "",
            "layers": layer.num_layers,
            "neuronsPerLayer": 0,  # pages of neurons are not among these
        },
        "sourceset": {
            "modelId": model,
            "name": layer.set,
            "description": f"{about}, {origin.hookpoint}",
            "creatorName": names.creator_name,
            "urls": [],
            "releaseName": release,
        },
        "source": {
            "id": source_id(layer),
            "modelId": model,
            "setName": layer.set,
            "dataset": layer.dataset,
            "num_prompts": layer.tokens // layer.found.context,
            "num_tokens_in_prompt": layer.found.context,
            "saelensConfig": config_of(layer.sae, origin),
        },
    }
    author = {"creatorId": names.creator_id, "visibility": "PUBLIC"}
    return {name: {**row, **author} for name, row in rows.items()}


def _place(layer: LayerFeatures, latent: int) -> Row:
    return {"modelId": model_id(layer), "layer": source_id(layer), "index": str(latent)}


def _feature(layer: LayerFeatures, feature: Row) -> Row:
    latent = feature["feature_index"]
    near, highest = layer.directions, float(layer.highest[latent])
    return {
        **_place(layer, latent),
        "sourceSetName": layer.set,
        "creatorId": layer.names.creator_id,
        "maxActApprox": highest,
        "hasVector": True,
        "vectorDefaultSteerStrength": highest,
        "hookName": layer.hook,
        "topkCosSimIndices": near.nearest[latent].tolist(),
        "topkCosSimValues": [float(cosine) for cosine in near.cosines[latent]],
        **{name: feature[name] for name in SHARED},
    }


def _activations(layer: LayerFeatures, feature: Row) -> Iterator[Row]:
    place = _place(layer, feature["feature_index"])
    for number, each in enumerate(feature["activations"]):
        values = each["values"]
        yield {
            "id": _id(layer, place["index"], "activation", number),
            **place,
            "tokens": each["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "creatorId": layer.names.creator_id,
            "binMin": each["bin_min"],
            "binMax": each["bin_max"],
            "binContains": each["bin_contains"],
            "qualifyingTokenIndex": each["qualifying_token_index"],
        }


def _explanations(layer: LayerFeatures, latent: int) -> Iterator[Row]:
    """Yield a latent's explanations by rules and by language models, with their scores.

    The rules are those made at this layer, or those of the group where it fires too rarely here;
    language models explain the group's.
    """
    explained = layer.explained.get(latent)
    if explained is None:
        return
    here = explained["layers"].get(str(layer.origin.layer))
    found, made = (explained["all"], "all layers of its group") if here is None else (here, "here")
    scores = found["scores"]
    by_rules = (
        f"Rules (groupsae), made from {made}; on {layer.found.num_tokens[1]:,} held-out "
        f"tokens: F1 {scores['f1']:.2f} (of another latent's rules {scores['null_f1']:.2f}), "
        f"precision {scores['precision']:.2f}, recall {scores['recall']:.2f}."
    )
    rows = [(found["text"], by_rules)]
    for name, text, words in layer.labels[layer.origin.group, latent].judged:
        rows.append((text, f"{name} (groupsae), made from all layers of its group; {words}."))
    for number, (text, notes) in enumerate(rows):
        yield {
            "id": _id(layer, str(latent), "explanation", number),
            **_place(layer, latent),
            "description": _shortened(text),
            "authorId": layer.names.creator_id,
            # names of a method and of a model must be known there; scores cannot be imported
            "typeName": None,
            "explanationModelName": None,
            "notes": notes,
        }


def _shortened(text: str) -> str:
    units = text.encode("utf-16-le")
    if len(units) <= 2 * LONGEST:
        return text
    return units[: 2 * LONGEST - 2].decode("utf-16-le", "ignore") + "…"


def _id(layer: LayerFeatures, *parts: object) -> str:
    """Return an id that is the same in every export: what is imported twice is there once."""
    text = json.dumps([layer.found.head["key"], source_id(layer), *parts])
    return f"c{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _line(row: Row) -> str:
    r"""Return a row as a line of JSON that the importer reads as it is.

    It replaces the text `\u0000` by a space before it reads the JSON: NUL cannot be stored. Texts
    with these six characters need another spelling of the backslash, or their line breaks.
    """
    text = json.dumps(row, allow_nan=False)
    if "u0000" in text:
        text = re.sub(r"(?<!\\)((?:\\\\)*)\\u0000", r"\1 ", text)  # NUL
        text = text.replace(r"\\u0000", r"\u005cu0000")  # a backslash and u0000
    return text + "\n"


def _write(path: Path, rows: Sequence[Row]) -> None:
    # without the time: the same run gives the same file
    path.write_bytes(gzip.compress("".join(map(_line, rows)).encode(), 6, mtime=0))


def recognises(folder: Path) -> bool:
    """Return whether this is the folder of a model that holds sources."""
    return folder.is_dir() and all((each / "source.jsonl").exists() for each in folder.iterdir())
