"""The runs of docs/real-models.md, each a command of `groupsae.train`, and what is read off them.

A finished run is not repeated, so a study that was stopped continues where it was.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from benchmarks.real_models.packages import english, gemma, labels, minilm, multilingual
from groupsae import train
from groupsae.app.run_folder import register_resolver, run_folder
from groupsae.app.stream import make_stream
from groupsae.config.instantiate import CONF, make
from groupsae.data.exchange import Exchange
from groupsae.evaluation.effect import CleanPredictions
from groupsae.evaluation.reconstruction import LayerSums, ReconstructionSums, layer_metrics
from groupsae.grouping.groupings import Grouping, groupings
from groupsae.grouping.rules import RULES
from groupsae.lm.splice import Splicer
from groupsae.suite.groups_file import load_plan
from groupsae.suite.suite import load_saes


class Model(NamedTuple):
    """A model of the study, and the options of its runs."""

    title: str
    folder: Callable[[Path], Path]
    options: tuple[str, ...]
    looked_at: tuple[int, ...]  # numbers of groups whose latents are explained and probed
    spliced: tuple[int, ...]  # layers at which the effect on the loss is measured; none: encoders
    shorter: tuple[str, ...]  # options of the runs that compare ways to train; none: as the others


MODELS = {
    "gemma": Model(
        "Gemma 3 270M (weights of 4 bits, dequantised)",
        gemma,
        (
            "tokens=524_288", "stream.context=256", "stream.max_tokens=680_000",
            "stream.heldout_fraction=0.1", "stream.calibration_fraction=0.05",
            "stream.heldout_tokens=8_192", "calibration.tokens=8_192", "sae.k=32",
            "sae.expansion=2", "stream.blocks_per_step=2", "stream.blocks_per_forward=2",
            "groups.last_layer=skip",
        ),
        (1, 3, 7),
        (3, 7, 11, 15),
        (
            "tokens=131_072", "stream.max_tokens=200_000", "stream.calibration_fraction=0.1",
            "stream.heldout_tokens=4_096",
        ),
    ),
    "minilm": Model(
        "all-MiniLM-L6-v2",
        minilm,
        (
            "tokens=524_288", "stream.context=128", "stream.max_tokens=740_000",
            "stream.heldout_fraction=0.1", "stream.calibration_fraction=0.05",
            "stream.heldout_tokens=16_384", "calibration.tokens=16_384", "sae.k=16",
            "sae.expansion=4", "stream.blocks_per_step=4", "stream.blocks_per_forward=4",
            "evaluation.tokens=16_384",
        ),
        (1, 2, 3),
        (),
        (),
    ),
}  # fmt: skip
COMMON = (
    "model=hf", "data=files", "stream.prepend_bos=true", "stream.num_workers=0",
    "dead_after=50_000", "eval_every=100_000", "checkpoint_every=256", "optim.base_lr=5e-4",
)  # fmt: skip
START = "b_dec_start=mean"
PAPER = ("calibration.centring=none", "b_dec_start=zero")
LANGUAGES = "other languages"  # of which only the angles are read
# name -> overrides; those of all groupings come first, as they fill the store
RUNS: dict[str, tuple[str, ...]] = {
    "all": ("groups=all", "groups.smaller=[]", START),
    "as the paper": ("groups=amad", "stream.exclude_special_tokens=false", *PAPER),
    "without BOS": ("groups=amad", *PAPER),
    "own biases and maps": ("groups=amad", "sae.layer_bias=per_layer", "sae.layer_rank=8"),
    "two rows per token": ("groups=amad", "stream.layers_per_token=2", START),
    LANGUAGES: (
        "groups=amad", "tokens=1_024", "stream.max_tokens=200_000", "data.cache=null",
        "stream.calibration_fraction=0.4", "stream.heldout_tokens=512",
    ),
}  # fmt: skip


class Study:
    """All runs of one model, trained when they are asked for."""

    def __init__(
        self,
        name: str,
        cache: Path,
        extra: Sequence[str] = (),
        rules: Sequence[str] = tuple(RULES),
    ) -> None:
        self.model = MODELS[name]
        self.labels = labels(cache)
        self._folders: dict[tuple[str, int], Path] = {}
        output = cache / "runs"
        self.options = [
            *COMMON,
            f"model.name={self.model.folder(cache)}",
            f"data.path={english(cache)}",
            f"data.cache={cache / 'store'}",
            f"output={output}",
            *self.model.options,
            *extra,
        ]
        self.more = {
            "all": [f"groups.rules=[{','.join(rules)}]"],
            LANGUAGES: [f"data.path={multilingual(cache)}"],
        }
        self.names = [f"complete-{count}" for count in self.model.looked_at]

    def overrides(self, run: str, seed: int) -> list[str]:
        """Return the arguments of a run."""
        evaluate = ["evaluate=true"] if self._evaluated(run) else []
        return [*self.options, *RUNS[run], *self.more.get(run, []), *evaluate, f"seed={seed}"]

    def _evaluated(self, run: str) -> bool:
        """Return whether a run is evaluated: of a decoder the study measures the effect itself."""
        return run == "all" and not self.model.spliced

    def folder(self, run: str, seed: int) -> Path:
        """Return the folder of a run, which is trained if it is not finished."""
        if (run, seed) not in self._folders:
            overrides = self.overrides(run, seed)
            folder = run_folder(composed(overrides))
            last = "evaluation/evaluation.json" if self._evaluated(run) else "summary.json"
            if not (folder / last).exists():
                print(f"run: {run}, seed {seed}", flush=True)
                train([*overrides, "+trainer.enable_progress_bar=false"])
            self._folders[run, seed] = folder
        return self._folders[run, seed]

    def summary(self, run: str, seed: int) -> dict[str, Any]:
        """Return the summary of a run."""
        found: dict[str, Any] = json.loads((self.folder(run, seed) / "summary.json").read_text())
        return found


def composed(overrides: Sequence[str]) -> Any:
    """Return the configuration of a command."""
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("train", list(overrides))


def groupings_of(folder: Path) -> list[Grouping]:
    """Return the groupings of a run, the chosen one first."""
    plan = load_plan(folder)
    assert plan is not None
    return groupings(plan)


def fvu(summary: dict[str, Any], grouping: Grouping) -> float:
    """Return the mean FVU over a grouping's grouped layers, of the run's last validation."""
    saes = summary["groups"]
    layers = grouping.grouped
    return float(
        np.mean([saes[grouping.sae_of_layer[x]]["fvu_per_layer"][str(x)] for x in layers])
    )


def kept(folder: Path, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return figures of a finished run, from a file in its folder if they were made before."""
    file = folder / f"study_{name}.json"
    if not file.exists():
        file.write_text(json.dumps(make()))
    found: dict[str, float] = json.loads(file.read_text())
    return found


def reconstruction(study: Study, run: str, seed: int) -> dict[str, float]:
    """Return means over the grouped layers of fvu, fvu_rest and the largest dimensions' share.

    Of the chosen grouping, on the stored held-out text.
    """
    folder = study.folder(run, seed)
    chosen = groupings_of(folder)[0]
    data = stream(study, run, seed)
    layers = chosen.grouped
    saes = {name: load_saes(folder / "saes", [name]) for name in set(chosen.sae_of_layer.values())}
    d_model = data.lm.geometry.d_model
    exchange = Exchange([[[layer] for layer in layers]])
    sums = {x: LayerSums(d_model) for x in layers}
    rebuilt = {
        x: ReconstructionSums(d_model, saes[chosen.sae_of_layer[x]].saes[name].d_sae)
        for x in layers
        for name in [chosen.sae_of_layer[x]]
    }
    for part in heldout_parts(data, exchange):
        for layer in layers:
            suite = saes[chosen.sae_of_layer[layer]]
            x, _ = part.rows([layer])
            latents = suite.encode_sparse(x, layer)
            x_hat = suite.decode_sparse(latents, layer)
            sums[layer].update(x[None], None)
            rebuilt[layer].update(x[None], x_hat[None], latents, None)
    found = [layer_metrics(sums[x], rebuilt[x]) for x in layers]
    return {
        "fvu": float(np.mean([each["fvu"] for each in found])),
        "fvu_rest": float(np.mean([each["fvu_rest"] for each in found])),
        "largest_share": float(np.mean([sums[x].largest_share for x in layers])),
    }


def stream(study: Study, run: str, seed: int) -> Any:
    """Return the activations of a run, from the store."""
    cfg = composed(study.overrides(run, seed))
    return make_stream(cfg, make(cfg.model), print)


def heldout_parts(data: Any, exchange: Exchange) -> Iterator[Any]:
    """Yield the held-out rows of a validation."""
    for blocks in data.steps("heldout", data.steps_for("heldout", data.heldout_tokens)):
        for part in data.reader.parts("heldout", blocks, exchange):
            yield data.reader.rows(part)


@torch.no_grad()
def delta_ce(
    study: Study, seed: int, chosen: dict[str, tuple[Path, Grouping]], blocks: int
) -> dict[str, float]:
    """Return the rise of the loss per grouping, mean over the layers `Model.spliced`, in nats.

    Like `groupsae.evaluate`, without its ablations and other layers, which would take hours: the
    head has 262,144 outputs.
    """
    data = stream(study, "all", seed)
    lm = data.lm.load_with_head(torch.device("cpu"))
    splicer, layers = Splicer(lm), [x for x in study.model.spliced]
    suites = {
        (name, layer): load_saes(folder / "saes", [grouping.sae_of_layer[layer]])
        for name, (folder, grouping) in chosen.items()
        for layer in layers
    }
    total, count, clean_ce = dict.fromkeys(chosen, 0.0), 0, 0.0
    for block in range(blocks):
        tokens = data.tokens("heldout", [block])
        output, acts = splicer.clean(tokens, layers)
        keep = data.filters.tokens(tokens)
        clean = CleanPredictions(output, tokens, keep)
        count += int(clean.predictions.sum())
        clean_ce += float(clean.ce.sum())
        for (name, layer), suite in suites.items():
            x = acts[layer]
            x_hat = suite.decode_sparse(suite.encode_sparse(x[0], layer), layer)[None]
            spliced = torch.where(keep[..., None], x_hat, x) if keep is not None else x_hat
            ce = clean.compare(splicer.resume(layer, spliced))[0]
            total[name] += float(ce.sum() - clean.ce.sum())
    return {name: value / count / len(layers) for name, value in total.items()} | {
        "clean": clean_ce / count
    }
