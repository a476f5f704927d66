"""The page that a repository of SAEs shows on the Hub: its README.md."""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from groupsae.files.reading import read_json, read_yaml
from groupsae.interop.format import Format
from groupsae.interop.names import is_in_a_block, parse_dictionary_name
from groupsae.suite.build import kind_of
from groupsae.suite.hub import looks_like_name
from groupsae.suite.suite import Suite

OURS = "groupsae"
_PLACE = re.compile(r"""(?<![\w/:.~-])/(?:[^\s/,'"]+/)+([^\s/,'"]*)""")
BINARY = (".safetensors", ".png")

LOAD = {
    OURS: """import groupsae

suite = groupsae.load_suite("hf:{repo}"{grouping})
latents = suite.encode(acts, layer={layer})  # acts: {hookpoint} of block {layer}, [..., d_model]
x_hat = suite.decode(latents, layer={layer})""",
    "saelens": """from sae_lens import SAE

sae = SAE.from_pretrained(release="{repo}", sae_id="{folder}")""",
    "sparsify": """from sparsify import SparseCoder

sae = SparseCoder.load_from_hub("{repo}", hookpoint="{folder}")""",
    "dictionary_learning": """from dictionary_learning.utils import load_dictionary
from huggingface_hub import snapshot_download

path = snapshot_download("{repo}", allow_patterns="{folder}/*")
sae, config = load_dictionary(path + "/{folder}", device="cpu")""",
}
# what of a run goes to the Hub
OF_RUN = (
    "saes/*/*",
    "groups.json",
    "summary.json",
    "ledger.json",
    "evaluation/evaluation.json",
    "evaluation/*.csv",
    "figures/*.png",
)
OF_SAE = ("cfg.json", "config.json", "sae_weights.safetensors", "sae.safetensors", "ae.pt")
FOLDED = """
Every folder holds the SAE of one layer's group with that layer's norm factor folded into the
biases, so it takes activations as they are. Its free metadata names group, layers and factor.
"""


def card(
    repo: str,
    run: Path,
    suite: Suite,
    *,
    grouping: str | None,
    chosen: Format | None,
    folders: Sequence[str],
) -> str:
    """Return the README.md of a repository.

    Args:
        repo: owner/name.
        run: folder of the run.
        suite: its SAEs.
        grouping: that they are, by name; None: the one that is loaded anyhow.
        chosen: the format they are in; None: our own.
        folders: of the exported SAEs.
    """
    config = next(iter(suite.configs.values()))
    model = str(config.get("model", "unknown"))
    head: dict[str, Any] = {
        "library_name": chosen.library if chosen else OURS,
        "tags": ["sparse-autoencoder", "group-sae", "interpretability"],
    }
    if looks_like_name(model):
        head["base_model"] = model
    data = _dataset(run)
    if data is not None:
        head["datasets"] = [data]
    shown = Path(model).name if Path(model).is_absolute() else model
    revision = f", revision {config['revision']}" if config.get("revision") else ""
    snippet = LOAD[chosen.name if chosen else OURS].format(
        repo=repo,
        grouping="" if grouping is None else f', grouping="{grouping}"',
        layer=suite.layers[0],
        hookpoint=config.get("hookpoint", "resid_post"),
        folder=folders[0] if folders else "",
    )
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo.partition('/')[2]}: sparse autoencoders for groups of layers of {shown}",
        "One sparse autoencoder for each group of similar layers (Group-SAE, arXiv 2410.21508), "
        f"on `{config.get('hookpoint', 'resid_post')}` of {shown}{revision}; {_origin(config)}.",
        _groups(suite, run),
        _evaluation(run, suite),
        FOLDED.strip() if chosen else "",
        f"## Use\n\n```python\n{snippet}\n```",
        _figures(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def files_of_run(run: Path) -> dict[str, Path | bytes]:
    """Return what of a run goes to the Hub: path there -> file, or content without local paths."""
    found = [file for pattern in OF_RUN for file in sorted(run.glob(pattern)) if file.is_file()]
    return {
        file.relative_to(run).as_posix(): file if file.suffix in BINARY else _clean(file)
        for file in found
    }


def figures_of_run(run: Path) -> dict[str, Path | bytes]:
    """Return the figures of a run that go to the Hub in every format."""
    return {f"figures/{file.name}": file for file in sorted((run / "figures").glob("*.png"))}


def of_groupsae(path: str) -> bool:
    """Return whether a path in a repository is one that an upload of ours may have put there."""
    folder, _, file = path.rpartition("/")
    named = "/" not in folder and (is_in_a_block(folder) or parse_dictionary_name(folder))
    return bool(file in OF_SAE and named) or any(fnmatch(path, pattern) for pattern in OF_RUN)


def _clean(file: Path) -> bytes:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.dumps(_without_places(json.loads(text))).encode()
    return _PLACE.sub(r"\1", text).encode()


def _without_places(value: Any) -> Any:
    """Return plain values with absolute paths, alone or in a text, cut to their last part."""
    if isinstance(value, Mapping):
        return {_without_places(key): _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return _PLACE.sub(r"\1", value) if isinstance(value, str) else value


def _dataset(run: Path) -> str | None:
    config = read_yaml(run / ".hydra" / "config.yaml")
    data = config.get("data") if isinstance(config, dict) else None
    name = data.get("name") if isinstance(data, dict) else None
    return name if isinstance(name, str) and looks_like_name(name) else None


def _origin(config: Mapping[str, Any]) -> str:
    adopted = config.get("adopted")
    if adopted:
        return f"trained elsewhere, and adopted from {_without_places(adopted['source'])}"
    tokens = config.get("tokens")
    counted = f" on {tokens:,} tokens each" if isinstance(tokens, int) else ""
    return f"trained with groupsae {config.get('groupsae', '')}{counted}"


def _groups(suite: Suite, run: Path) -> str:
    rows = []
    summary = read_json(run / "summary.json") or {}
    trained = summary.get("groups") or {}
    for name, sae in suite.saes.items():
        layers = suite.configs[name]["layers"]
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        known = trained.get(name) or {}
        k = getattr(sae, "k", None)
        kind = kind_of(sae) + (f", k = {k}" if k is not None else "")
        rows.append(
            f"| {name} | {span} | {kind} | {sae.d_sae:,} | {_number(known.get('fvu'))} | "
            f"{_number(known.get('l0'), 1)} |"
        )
    head = "| SAE | layers | kind | latents | FVU | L0 |\n|---|---|---|---|---|---|"
    amad = summary.get("amad")
    told = f"\n\nAMAD {_number(amad)} (mean over groups of the largest angle, fractions of pi)."
    return "## Groups\n\n" + "\n".join([head, *rows]) + (told if amad is not None else "")


def _evaluation(run: Path, suite: Suite) -> str:
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    if evaluation is None:
        return ""
    names = {"fvu": "FVU", "l0": "L0", "delta_ce": "CE added, nats", "ce_score": "CE recovered"}
    digits = {"l0": 1}
    rows = []
    for row in evaluation.get("results", []):
        if row["sae"] not in suite.saes:  # of another grouping of the run
            continue
        values = [_number(_value(row.get(each)), digits.get(each, 4)) for each in names]
        rows.append(f"| {' | '.join([str(row['layer']), row['sae'], *values])} |")
    head = f"| layer | SAE | {' | '.join(names.values())} |\n|---|---|" + "---|" * len(names)
    told = f"On {evaluation.get('tokens', 0):,} held-out tokens, one layer replaced at a time.\n\n"
    return "## Evaluation\n\n" + told + "\n".join([head, *rows])


def _figures(run: Path) -> str:
    shown = "\n\n".join(f"![{Path(path).stem}]({path})" for path in figures_of_run(run))
    return f"## Figures\n\n{shown}" if shown else ""


def _value(stored: Any) -> float | None:
    return stored.get("value") if isinstance(stored, Mapping) else stored


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
