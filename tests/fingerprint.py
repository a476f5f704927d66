"""Fingerprints of real runs, to prove that a change of the code changed no number.

Tests say that results are right within a tolerance; a restructuring has to leave them equal to
the last bit. So this trains and evaluates by the command line, before the change and after it,
and compares what the run folders hold:

    python tests/fingerprint.py --small --write before.json      # with the code as it was
    python tests/fingerprint.py --small --against before.json    # with the changed code

The second ends with 1 and a list of differences if there are any. Both options can be given at
once; `--only default,ddp` runs some cases and keeps the others that the file has. Results belong
to one machine and its installed packages. Nothing of `groupsae` is imported here: only documented
keys and files are relied on, and the package that runs is the one next to this folder.

Recorded of each run: the SHA-256 of every `saes/*/sae.safetensors`, `groups.json`, and all of
`evaluation/evaluation.json`, numbers in full precision; without the keys in `DROPPED`. The hashes
`hash` (of the groups), `weights` and `text` stay: they decide whether old runs can be evaluated.
Every process computes in one thread, so load and the number of cores do not matter.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DROPPED = {
    "run",  # the run folder, whose name has a hash of the configuration
    "format",  # of the file
    "groupsae",  # version
    "seconds",
    "architecture",  # the name of a class
}
SHOWN = 12  # differences of one run
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TRAIN = ["-m", "groupsae.train"]
SMALL_DEFAULT = [
    "tokens=20_480", "calibration.tokens=8_192", "stream.heldout_tokens=4_096", "eval_every=5",
]  # fmt: skip
SMALL = [
    "tokens=6_144", "stream.context=128", "stream.blocks_per_step=4", "eval_every=6",
    "calibration.tokens=4_096", "stream.heldout_tokens=2_048", "dead_after=1_000",
    "stream.max_tokens=1_000_000",
]  # fmt: skip
KINDS = {  # each with another option, at no cost
    "topk": ["b_dec_start=geometric_median"],
    "batchtopk": ["groups=count", "groups.num_groups=1", "stream.max_norm_ratio=1.5"],
    "jumprelu": ["groups=even", "groups.num_groups=3"],
    "relu": ["nonfinite=skip", "stream.skip_positions=1"],
    "gated": ["groups=published", "calibration.centring=mean"],
    "matryoshka": ["groups=per_layer", "evaluation.together=true"],
}


class Failed(Exception):
    """A command did not do what it should; the message has the end of what it wrote."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def command(arguments: list[str], folder: Path, stop_in: Path | None = None) -> None:
    """Run Python; with `stop_in`, send SIGTERM once a checkpoint lies below that folder."""
    log = folder / "log.txt"
    with log.open("w") as handle:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=ENV, stdout=handle, stderr=handle
        )
        try:
            while stop_in is not None and process.poll() is None:
                if any(stop_in.rglob("checkpoints/*.ckpt")):
                    process.terminate()
                    break
                time.sleep(0.02)
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    expected = 0 if stop_in is None else 128 + signal.SIGTERM
    if status != expected:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise Failed(f"status {status}, not {expected}: python {' '.join(arguments)}\n{end}")


def without(value: Any) -> Any:
    """Return a json value without the dropped keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(each) for key, each in value.items() if key not in DROPPED}
    return [without(each) for each in value] if isinstance(value, list) else value


def run_folder(output: Path) -> Path:
    found = [path.parent for path in output.rglob("groups.json")]
    if len(found) != 1:
        raise Failed(f"one run folder was expected, there are {len(found)}")
    return found[0]


def fingerprint(output: Path) -> dict[str, Any]:
    """Return what is recorded of the one run below an output folder."""
    folder = run_folder(output)
    saes = sorted(folder.glob("saes/*/sae.safetensors"))
    found = {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in saes}
    for path in (folder / "groups.json", folder / "evaluation" / "evaluation.json"):
        found[path.name] = without(json.loads(path.read_text()))
    return found


def train(folder: Path, name: str, *arguments: str, evaluate: bool = True) -> dict[str, Any]:
    """Train and evaluate in one command, or, with `evaluate` false, in two."""
    output = folder / name
    command([*TRAIN, *arguments, f"output={output}", f"evaluate={evaluate}"], folder)
    if not evaluate:
        command(["-m", "groupsae.evaluate", f"run={run_folder(output)}"], folder)
    return fingerprint(output)


def resumed(folder: Path) -> dict[str, Any]:
    """Train undisturbed, and with a SIGTERM after the first checkpoint."""
    given = [*SMALL, "tokens=20_480", "checkpoint_every=5"]
    found = {"undisturbed": train(folder, "undisturbed", *given)}
    output = folder / "resumed"
    command([*TRAIN, *given, f"output={output}", "evaluate=true"], folder, stop_in=output)
    command([*TRAIN, f"resume={run_folder(output)}"], folder)
    return found | {"resumed": fingerprint(output)}


def store(folder: Path) -> dict[str, Any]:
    """Train while a store of activations is filled, and again from it."""
    cache, found, changed = folder / "store", {}, []
    for name in ("filling", "reading"):
        found[name] = train(folder, name, *SMALL, f"data.cache={cache}")
        changed.append({p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.stat().st_size})
    if not changed[0] or changed[0] != changed[1]:
        raise Failed("the second run did not leave the store as it was")
    return found


def cases(small: bool) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Return what every case runs: a folder in, fingerprints by the name of the run out."""
    default = SMALL_DEFAULT if small else []
    several = [*SMALL, "groups=all", "groups.rules=[complete,even]", "groups.smaller=[2]"]
    parallel = [*SMALL, "trainer.accelerator=cpu", "trainer.devices=2"]
    return {
        "default": lambda to: {"run": train(to, "run", *default)},
        "all": lambda to: {"run": train(to, "run", *several)},
        "ddp": lambda to: {"run": train(to, "run", *parallel, "trainer=ddp")},
        "sae_parallel": lambda to: {
            "run": train(to, "run", *parallel, "trainer=sae_parallel", evaluate=False)
        },
        "resumed": resumed,
        "store": store,
        "kinds": lambda to: {
            kind: train(to, kind, *SMALL, f"sae={kind}", *more) for kind, more in KINDS.items()
        },
    }


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """Yield where two recorded values are not the same."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = (dict(enumerate(each)) for each in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            absent = "(absent)"
            yield from differences(before.get(key, absent), now.get(key, absent), f"{at} {key}")
    elif (texts := [json.dumps(each) for each in (before, now)])[0] != texts[1]:
        short = [text if len(text) <= 70 else f"{text[:67]}..." for text in texts]
        yield f"{at.strip()}: {short[0]} before, {short[1]} now"


def compared(case: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return all differences of a case, those between its own runs that must be equal as well."""
    if not before:
        return [f"{case}: the file to compare with does not have it"]
    pairs = [(name, before.get(name, {}), now.get(name, {})) for name in {**before, **now}]
    if case in ("resumed", "store"):
        pairs += [(f"{b}, not as {a}", now[a], now[b]) for a, b in pairwise(now)]
    lines = []
    for name, old, new in pairs:
        found = [f"{case}, {name}: {each}" for each in differences(old, new)]
        more = [f"{case}, {name}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        lines += found[:SHOWN] + more
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="record; other cases stay")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with these")
    parser.add_argument("--small", action="store_true", help="a small default: not 1M tokens")
    parser.add_argument("--only", metavar="CASE,...", help="of " + ",".join(cases(True)))
    given = parser.parse_args()
    known = cases(given.small)
    chosen = given.only.split(",") if given.only else list(known)
    if not (given.write or given.against) or not known.keys() >= set(chosen):
        parser.error(f"give --write or --against, and as --only some of {', '.join(known)}")
    before = json.loads(given.against.read_text()) if given.against else None
    written = json.loads(given.write.read_text()) if given.write and given.write.exists() else {}
    wrong: list[str] = []
    # when asked to end, it ends its command and removes its folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="fingerprint-") as top:
        beside = f"import groupsae as g; assert g.__file__.startswith({f'{ROOT}/'!r}), g.__file__"
        command(["-c", beside], Path(top))
        for case in chosen:
            start, folder = time.monotonic(), Path(top) / case
            folder.mkdir()
            # default has two sizes, and one is no baseline for the other
            key = "default-small" if given.small and case == "default" else case
            try:
                now = known[case](folder)
                found = compared(key, now if before is None else before.get(key, {}), now)
                if given.write:
                    written[key] = now
                    part = given.write.with_suffix(".partial")
                    part.write_text(json.dumps(written, indent=1))
                    part.replace(given.write)
            except Failed as failed:
                found = [f"{case}: {failed}"]
            wrong += found
            result = f"{len(found)} differences or failures" if found else "as it should be"
            say(f"{case}: {result} ({time.monotonic() - start:.0f} s)")
    say("\n".join(wrong) or "no difference")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
