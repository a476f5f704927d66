"""What a run uploads to the Hub: its files without local paths, and the page README.md."""

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from groupsae.files.reading import read_json, read_yaml
from groupsae.interop.library import IN_A_BLOCK, Library
from groupsae.lm.hookpoints import HOOKPOINTS
from groupsae.suite.hub import check_name, looks_like_name, upload
from groupsae.suite.suite import EVALUATION, RESULTS, SUMMARY, Suite
from groupsae.suite.table import HEADINGS, UNKNOWN, as_text, value_of

_PATH = re.compile(r"""(?<![\w/:.~-])/(?:[^\s/,'"]+/)+([^\s/,'"]*)""")
_FOLDER = re.compile(rf"({'|'.join(HOOKPOINTS)})_layer_\d+$")  # of dictionary_learning
BINARY = (".safetensors", ".png")

LOAD = """import groupsae

suite = groupsae.Suite.from_pretrained("{repo}"{grouping})
model, tokenizer = suite.load_model()
sae = suite[{layer}]
latents = sae.encode(acts)  # acts: {hookpoint} of block {layer}, [..., d_model]
x_hat = sae.decode(latents)"""
# files of a run that go to the Hub
OF_RUN = (
    "saes/*/*",
    "groups.json",
    *RESULTS,
)
OF_SAE = ("cfg.json", "config.json", "sae_weights.safetensors", "sae.safetensors", "ae.pt")
FOLDED = """
Every folder holds the SAE of one layer's group with that layer's norm factor folded into the
biases, so it takes raw activations. Its free metadata names group, layers and factor.
"""


def publish(
    repo: str,
    suite: Suite,
    files: Mapping[str, Path | bytes],
    *,
    run: Path,
    private: bool,
    overwrite: bool,
    grouping: str | None = None,
    library: Library | None = None,
    folders: Sequence[str] = (),
    message: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload files of a suite and the page about them; return the repository's address.

    The arguments are those of `card` and `upload`. With `overwrite`, files of an earlier upload
    that are not among the new ones are removed.

    Raises:
        UserError: the name is none, or the Hub refuses the upload or cannot be reached.
    """
    check_name(repo, repo)
    page = card(repo, run, suite, grouping=grouping, library=library, folders=folders)
    return upload(
        repo,
        {**files, "README.md": page.encode()},
        message=message or f"SAEs of {len(suite)} layers, by groupsae",
        private=private,
        replaced=is_upload if overwrite else None,
        revision=revision,
    )


def card(
    repo: str,
    run: Path,
    suite: Suite,
    *,
    grouping: str | None,
    library: Library | None,
    folders: Sequence[str],
) -> str:
    """Return the README.md of a repository of a run's SAEs.

    `library` None: they are in our own format, and `folders` is empty. `grouping` None: the one
    that is loaded by default.
    """
    config = suite.cfg
    model, hookpoint = str(config.get("model", "unknown")), config.get("hookpoint", "resid_post")
    head: dict[str, Any] = {
        "library_name": library.name if library else "groupsae",
        "tags": ["sparse-autoencoder", "group-sae", "interpretability"],
    }
    if looks_like_name(model):
        head["base_model"] = model
    dataset = dataset_of(run)
    if dataset is not None and looks_like_name(dataset):
        head["datasets"] = [dataset]
    shown = Path(model).name if Path(model).is_absolute() else model
    revision = f", revision {config['revision']}" if config.get("revision") else ""
    snippet = (library.snippet if library else LOAD).format(
        repo=repo,
        grouping="" if grouping is None else f', grouping="{grouping}"',
        layer=suite.layers[0],
        hookpoint=hookpoint,
        folder=folders[0] if folders else "",
    )
    figures = "\n\n".join(f"![{Path(path).stem}]({path})" for path in figures_of_run(run))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo.partition('/')[2]}: sparse autoencoders for groups of layers of {shown}",
        "One sparse autoencoder for each group of similar layers (Group-SAE, arXiv 2410.21508), "
        f"on `{hookpoint}` of {shown}{revision}; {_origin(config)}.",
        _groups(suite, run),
        _evaluation(run, suite),
        FOLDED.strip() if library else "",
        f"## Use\n\n```python\n{snippet}\n```",
        f"## Figures\n\n{figures}" if figures else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def dataset_of(run: Path) -> str | None:
    """Return the name of a run's text: of a dataset, or the last part of a path."""
    settings = read_yaml(run / ".hydra" / "config.yaml")
    data = settings.get("data") if isinstance(settings, dict) else None
    if not isinstance(data, dict):
        return None
    name, path = data.get("name"), data.get("path")
    if isinstance(name, str):
        return str(_reduced(name))
    return Path(path).name if isinstance(path, str) else None


def files_of_run(run: Path) -> dict[str, Path | bytes]:
    """Return a run's files for the Hub: path there -> file, or content without local paths."""
    files = [file for pattern in OF_RUN for file in sorted(run.glob(pattern)) if file.is_file()]
    return {
        file.relative_to(run).as_posix(): file if file.suffix in BINARY else _without_paths(file)
        for file in files
    }


def figures_of_run(run: Path) -> dict[str, Path | bytes]:
    """Return the figures of a run, which go to the Hub in every format."""
    return {f"figures/{file.name}": file for file in sorted((run / "figures").glob("*.png"))}


def is_upload(path: str) -> bool:
    """Return whether an upload of ours may have put this path into a repository."""
    folder, _, file = path.rpartition("/")
    of_sae = "/" not in folder and (IN_A_BLOCK.search(folder) or _FOLDER.match(folder))
    return bool(file in OF_SAE and of_sae) or any(fnmatch(path, pattern) for pattern in OF_RUN)


def _without_paths(file: Path) -> bytes:
    """Return the content of a file with absolute paths reduced to their last part."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.dumps(_reduced(json.loads(text))).encode()
    return _PATH.sub(r"\1", text).encode()


def _reduced(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_reduced(key): _reduced(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_reduced(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return _PATH.sub(r"\1", value) if isinstance(value, str) else value


def _origin(config: Mapping[str, Any]) -> str:
    if config.get("adopted"):  # imported, in the word of earlier versions
        return f"trained elsewhere, and imported from {_reduced(config['adopted']['source'])}"
    tokens = config.get("tokens")
    counted = f" on {tokens:,} tokens each" if isinstance(tokens, int) else ""
    return f"trained with groupsae {config.get('groupsae', '')}{counted}"


def _groups(suite: Suite, run: Path) -> str:
    table = suite.table()
    rows = [f"| {' | '.join(row)} |" for row in as_text(table).itertuples(index=False)]
    head = [f"| {' | '.join(HEADINGS[name] for name in table)} |", "|---" * table.shape[1] + "|"]
    rows = [*head, *rows]
    amad = (read_json(run / SUMMARY) or {}).get("amad")
    if amad is not None:
        amad = f"AMAD {_number(amad)} (mean over groups of the largest angle, "
        rows += ["", amad + "fractions of pi)."]
    return "\n".join(["## Groups", "", *rows])


def _evaluation(run: Path, suite: Suite) -> str:
    evaluation = read_json(run / EVALUATION)
    if evaluation is None:
        return ""
    names = {"fvu": "FVU", "l0": "L0", "delta_ce": "CE added, nats", "ce_score": "CE recovered"}
    rows = [f"| layer | SAE | {' | '.join(names.values())} |", "|---|---|" + "---|" * len(names)]
    for row in evaluation.get("results", []):
        if row["sae"] in suite.saes:  # not of another grouping of the run
            values = [_number(row.get(name), 1 if name == "l0" else 4) for name in names]
            rows.append(f"| {row['layer']} | {row['sae']} | {' | '.join(values)} |")
    tokens = f"On {evaluation.get('tokens', 0):,} held-out tokens, one layer replaced at a time."
    return "\n".join(["## Evaluation", "", tokens, "", *rows])


def _number(stored: Any, digits: int = 4) -> str:
    """Return a number, stored alone or as the value of an estimate, as text."""
    value = value_of(stored)
    return UNKNOWN if value is None else f"{value:.{digits}f}"
