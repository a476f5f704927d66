"""Small evaluated runs for the tests, made once a session, and what they must come to.

The reference reads the packed text from the cache and runs the model as Hugging Face has it, one
sequence at a time, with a plain hook; its sums are float64.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupsae.app.run_folder import register_resolver
from groupsae.config.instantiate import CONF
from groupsae.suite.suite import Suite, load_suite
from tests.helpers.runs import config_of, overrides, run

KINDS = {
    "ordinary": ("groups=count", "groups.num_groups=2", "evaluation.together=true"),
    "all": ("groups=all", "groups.rules=[complete,even]", "groups.smaller=[1,2]"),
    "special": (
        "evaluation.together=true",
        "groups=count",
        "groups.num_groups=2",
        "stream.prepend_bos=true",
        "stream.exclude_special_tokens=true",
    ),
    "filtered": (
        "evaluation.together=true",
        "groups=count",
        "groups.num_groups=2",
        "model.hookpoint=mlp_out",
        "stream.skip_positions=2",
        "stream.max_norm_ratio=1.3",
    ),
}


@cache
def evaluated(kind: str, lm: Path, text: Path, base: Path) -> Path:
    """Return the folder of a run that was evaluated at the end of its training."""
    status, folder = run(overrides(lm, text, base / "evaluated", "evaluate=true", *KINDS[kind]))
    assert status == 0
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Return evaluation.json, refusing what strict JSON does not know."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "evaluation" / "evaluation.json").read_text()
    evaluation: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return evaluation


def evaluate(folder: Path, *arguments: str) -> dict[str, Any]:
    """Evaluate as the command line would, in this process; return evaluation.json."""
    from groupsae.evaluate import evaluate as command

    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("evaluate", [f"run={folder}", "device=cpu", *arguments])
    command(cfg)
    return read(folder)


def set_option(folder: Path, key: str, value: Any) -> None:
    """Change what the run folder remembers of its configuration."""
    cfg = config_of(folder)
    OmegaConf.update(cfg, key, value)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")


def without_seconds(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the evaluation without the one value that a clock decides."""
    cost = {k: v for k, v in evaluation["cost"].items() if k != "seconds"}
    return {**evaluation, "cost": cost}


def blocks(folder: Path, split: str) -> torch.Tensor:
    """Return the packed blocks of a split, as they lie in the cache."""
    cfg = config_of(folder)
    text = json.loads(next(iter((folder / "saes").glob("*/cfg.json"))).read_text())["text"]
    file = Path(cfg.output) / "cache" / "tokens" / text / f"{split}.bin"
    return torch.from_numpy(np.fromfile(file, np.int32)).view(-1, cfg.stream.context).long()


class Plain:
    """The language model as Hugging Face has it."""

    def __init__(self, folder: Path) -> None:
        whole = config_of(folder)
        cfg, self.stream = whole.model, whole.stream
        name, dtype = cfg.name, getattr(torch, cfg.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        layers = self.model.gpt_neox.layers
        self.layers = {"resid_post": list(layers), "mlp_out": [x.mlp for x in layers]}[
            cfg.hookpoint
        ]
        self.special = AutoTokenizer.from_pretrained(name).all_special_ids

    def counted(self, tokens: torch.Tensor, exclude: bool) -> torch.Tensor:
        """Return which positions of one sequence count on every layer."""
        special = torch.tensor(self.special if exclude else [])
        return ~torch.isin(tokens, special) & (
            torch.arange(len(tokens)) >= self.stream.skip_positions
        )

    def typical(self, acts: torch.Tensor) -> torch.Tensor:
        """Return which positions of one sequence are not extreme on a layer, [*, pos]."""
        if self.stream.max_norm_ratio is None:
            return torch.ones(acts.shape[:-1], dtype=torch.bool)
        norms = acts.norm(dim=-1)
        most = self.stream.max_norm_ratio * norms.flatten().sort().values[(norms.numel() - 1) // 2]
        return norms <= most

    @contextmanager
    def hook(self, layer: int, change: Callable[[torch.Tensor], Any]) -> Iterator[None]:
        """Let `change` see a layer's residual; what it returns, if anything, replaces it."""

        def visit(_module: Any, _args: Any, output: Any) -> Any:
            residual = output if isinstance(output, torch.Tensor) else output[0]
            changed = change(residual)
            if changed is None or isinstance(output, torch.Tensor):
                return changed
            return (changed, *output[1:])

        handle = self.layers[layer].register_forward_hook(visit)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the float64 logits of one sequence, [pos, vocab]."""
        logits: torch.Tensor = self.model(input_ids=tokens[None], use_cache=False).logits
        return logits[0].double()

    @torch.no_grad()
    def residuals(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return every layer's residuals of one sequence, [pos, d_model] each."""
        found: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(
                lambda _m, _a, out: found.append(out if isinstance(out, torch.Tensor) else out[0])
            )
            for layer in self.layers
        ]
        self.model(input_ids=tokens[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return [residual[0] for residual in found]


def reference(folder: Path, exclude: bool) -> dict[Any, dict[str, float]]:
    """Return what evaluation.json must say of "clean", layers, (SAE, layer), and groupings.

    A grouping's are of all layers spliced at once.
    """
    plain, evaluation = Plain(folder), read(folder)
    text = blocks(folder, "heldout")
    order = np.random.default_rng([0, 0]).permutation(len(text))  # the sample that all take
    text = text[order[: evaluation["sequences"]]]
    means = _means(plain, blocks(folder, "calibration")[: len(text)], exclude)
    suites = {g["name"]: load_suite(folder, grouping=g["name"]) for g in evaluation["groupings"]}
    layers = next(iter(suites.values())).layers
    owner = {
        (suite.group_of(layer), layer): suite for suite in suites.values() for layer in layers
    }
    sums: dict[Any, dict[str, float]] = {}
    acts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def add(key: Any, name: str, value: torch.Tensor) -> None:
        sums.setdefault(key, {}).setdefault(name, 0.0)
        sums[key][name] += float(value.double().sum())

    for tokens in text:
        keep = plain.counted(tokens, exclude)
        counted = keep[:-1]  # the token after them is predicted, whatever it is
        clean = plain.logits(tokens)
        add("clean", "predictions", counted)
        add("clean", "tokens", keep)
        add("clean", "ce", F.cross_entropy(clean[:-1], tokens[1:], reduction="none")[counted])
        residuals = plain.residuals(tokens)

        def splice(
            key: Any,
            layer: int,
            x_hat: torch.Tensor,
            name: str,
            tokens: torch.Tensor = tokens,
            keep: torch.Tensor = keep,
            clean: torch.Tensor = clean,
        ) -> None:
            with plain.hook(layer, lambda acts: swap(keep & plain.typical(acts), x_hat, acts)):
                logits = plain.logits(tokens)
            ce = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
            add(key, name, ce[keep[:-1]])
            p, q = clean.log_softmax(-1), logits.log_softmax(-1)
            add(key, f"kl_{name}", (p.exp() * (p - q)).sum(-1)[:-1][keep[:-1]])

        for layer in layers:
            x = residuals[layer]
            acts[layer].append(x[keep & plain.typical(x)].double())
            splice(layer, layer, torch.zeros_like(x), "zero")
            splice(layer, layer, means[layer].expand_as(x), "mean")
        for (name, layer), suite in owner.items():
            x = residuals[layer]
            x_hat, mine = suite.reconstruct(x, layer), keep & plain.typical(x)
            add((name, layer), "error", (x.double() - x_hat.double())[mine].square())
            add((name, layer), "l0", (suite.encode(x, layer) > 0)[mine])
            splice((name, layer), layer, x_hat, "ce")
        for name in (g["name"] for g in evaluation["groupings"] if g["spliced_together"]):
            with ExitStack() as hooks:
                for layer in layers:

                    def rebuild(
                        acts: torch.Tensor,
                        layer: int = layer,
                        suite: Suite = suites[name],
                        keep: torch.Tensor = keep,
                    ) -> torch.Tensor:
                        mine = keep & plain.typical(acts)
                        return swap(mine, suite.reconstruct(acts, layer), acts)

                    hooks.enter_context(plain.hook(layer, rebuild))
                logits = plain.logits(tokens)
            add(name, "ce", F.cross_entropy(logits[:-1], tokens[1:], reduction="none")[counted])
            p, q = clean.log_softmax(-1), logits.log_softmax(-1)
            add(name, "kl", (p.exp() * (p - q)).sum(-1)[:-1][counted])
    return _ratios(sums, {layer: torch.cat(rows) for layer, rows in acts.items()})


def swap(keep: torch.Tensor, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x with the positions that count replaced."""
    return torch.where(keep[..., None], x_hat.to(x.dtype), x)


def _means(plain: Plain, text: torch.Tensor, exclude: bool) -> list[torch.Tensor]:
    kept: list[list[torch.Tensor]] = [[] for _ in plain.layers]
    for tokens in text:
        keep, found = plain.counted(tokens, exclude), plain.residuals(tokens)
        for x in found:
            keep = keep & plain.typical(x)
        for rows, x in zip(kept, found, strict=True):
            rows.append(x[keep].double())
    return [torch.cat(rows).mean(0).float() for rows in kept]


def _ratios(
    sums: dict[Any, dict[str, float]], acts: dict[int, torch.Tensor]
) -> dict[Any, dict[str, float]]:
    clean = sums["clean"]
    n, tokens = clean["predictions"], clean["tokens"]
    ce = clean["ce"] / n
    found = {"clean": {"ce": ce, "predictions": n, "tokens": tokens}}
    for key, part in sums.items():
        if isinstance(key, int):
            found[key] = {"ce_zero": part["zero"] / n, "ce_mean": part["mean"] / n}
            found[key]["kl_zero"] = part["kl_zero"] / n
        elif isinstance(key, str) and key != "clean":
            found[key] = {"ce": part["ce"] / n, "delta_ce": part["ce"] / n - ce}
            found[key]["kl"] = part["kl"] / n
    for key, part in sums.items():
        if isinstance(key, tuple):
            x, scale, spliced = acts[key[1]], found[key[1]], part["ce"] / n
            found[key] = {
                "fvu": part["error"] / float((x - x.mean(0)).square().sum()),
                "l0": part["l0"] / len(x),
                "mse": part["error"] / len(x),
                "ce": spliced,
                "delta_ce": spliced - ce,
                "delta_ce_percent": 100 * (spliced - ce) / ce,
                "kl": part["kl_ce"] / n,
                "ce_score": (scale["ce_zero"] - spliced) / (scale["ce_zero"] - ce),
                "ce_score_mean": (scale["ce_mean"] - spliced) / (scale["ce_mean"] - ce),
                "kl_score": (scale["kl_zero"] - part["kl_ce"] / n) / scale["kl_zero"],
            }
    return found
