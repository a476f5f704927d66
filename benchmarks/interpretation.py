"""What looking into latents costs: `python -m benchmarks.interpretation`.

A quarter of an hour on one quiet core. On the bundled model with one group and the last layer's
own SAE, trained for a moment: how much longer collecting takes than the model's forward and the
encoding alone, on a million tokens; how its memory grows, against `dry_run`; how long one
explanation and the transfer matrices take; and a page of 10,000 latents, in Chromium if there is
one. `size=smallest` is for CI; `tokens=` is how many are read instead of a million.

Writes benchmarks/results/interpretation.md.
"""

import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from benchmarks.timing import SMALLEST_RUN, options, smallest, write
from groupsae.app.evaluate import device_named, same_stream
from groupsae.app.fit import fit
from groupsae.app.run_folder import finished_run, open_run, register_resolver
from groupsae.config.instantiate import CONF
from groupsae.interpret import interpret as command
from groupsae.interpretation.collect import Kept
from groupsae.interpretation.explain import Explainer, choose
from groupsae.interpretation.files import Interpretation
from groupsae.interpretation.reading import Pass
from groupsae.interpretation.rule_scores import f1
from groupsae.interpretation.rules import predict, rules_of
from groupsae.interpretation.sharing import transfer
from groupsae.interpretation.text import Part, Text
from groupsae.suite.suite import Suite, load_saes

GIVEN = options(sys.argv[1:], tokens=("1_000_000", r"[\d_]+"), collect=("", ".*"))
TOKENS = 4_096 if smallest() else int(GIVEN["tokens"])
FIRST = 2_048 if smallest() else 100_000
EVERY = 2 if smallest() or TOKENS < 500_000 else 6  # the parts that are timed
LATENTS = 256 if smallest() else 5_000  # of each of the page's two SAEs
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def trained(output: Path, *options: str) -> Path:
    """Return the folder of a run that was trained for a moment."""
    most = [] if smallest() else [f"stream.max_tokens={2 * TOKENS}"]
    given = [
        *SMALLEST_RUN,
        *most,
        f"output={output}",
        "groups=count",
        "groups.num_groups=1",
        *options,
    ]
    register_resolver()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("train", given)
    with open_run(cfg, given) as opened:
        fit(opened)
        return opened.folder


def interpret(run: Path, *options: str) -> None:
    """Interpret a run."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        command(compose("interpret", [f"run={run}", "logger=none", "device=cpu", *options]))


def text(tokens: int) -> list[str]:
    """Return the options for texts of at most so many tokens."""
    tokens = 4_096 if smallest() else tokens
    return [f"interpretation.{side}_tokens={tokens}" for side in ("explain", "score")]


def collected(run: Path) -> dict[str, Any]:
    """Return seconds and memory of a pass over text, in this process.

    In some parts the model's forward and the encoding are also run without collecting.
    """
    names = sorted(folder.name for folder in (run / "saes").iterdir())
    saes = {name: load_saes(run / "saes", [name]) for name in names}
    data = same_stream(
        run,
        finished_run(run, trusted=False),
        saes[names[0]].configs[names[0]],
        device_named("cpu"),
    )
    score = min(TOKENS // 2, data.blocks.blocks["heldout"].size)
    read, kept = Text(data, TOKENS - score, score), Kept()
    plain(data, saes, next(read.parts()))
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        found = Pass(Path(folder), "", data, read, saes, kept)
        found.resume()
        seconds: dict[str, list[float]] = {"collecting": [], "forward and encoding": []}
        tokens, early = 0, 0
        for part in read.parts():
            began = time.perf_counter()
            found.update(part)
            if part.number % EVERY == 1:
                seconds["collecting"].append(time.perf_counter() - began)
                began = time.perf_counter()
                plain(data, saes, part)
                seconds["forward and encoding"].append(time.perf_counter() - began)
            tokens += part.tokens.numel()
            early = peak() if tokens <= FIRST or not early else early
        late, planned = peak(), found.needs(tokens)[0]
    return {
        "seconds": {name: sum(each) for name, each in seconds.items()},
        "timed": len(seconds["collecting"]),
        "read": tokens,
        "memory": {
            "planned": planned,
            "early": early - before,
            "late": late - before,
        },
    }


def in_a_child(run: Path) -> dict[str, Any]:
    """Return what `collected` does, in a new process, whose memory nothing else has used."""
    child = [sys.executable, "-m", "benchmarks.interpretation", f"collect={run}"]
    child.append(f"tokens={TOKENS}")
    printed = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@torch.no_grad()
def plain(data: Any, saes: dict[str, Suite], part: Part) -> None:
    """Run the model and the encoders on a part, and keep nothing."""
    layers = sorted({layer for suite in saes.values() for layer in suite.layers})

    def visit(layer: int, acts: torch.Tensor) -> None:
        for suite in saes.values():
            if layer in suite.layers:
                suite.encode_sparse(acts.flatten(0, 1), layer)

    for start in range(0, len(part.tokens), data.blocks_per_forward):
        blocks = part.tokens[start : start + data.blocks_per_forward]
        data.hooked.run(data.hooked.inputs(blocks), layers, visit, stop=True)


def peak() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def explained(run: Path) -> list[tuple[int, int, float]]:
    """Return of each SAE: layers, explanations made, CPU seconds of one."""
    found, rows = Interpretation(run / "interpretation"), []
    explainer = Explainer(found)
    for name, sae in found.saes.items():
        latents = choose(sae, 2 if smallest() else 32).latents
        began = time.process_time()
        made = explainer.explain(name, latents)
        seconds = time.process_time() - began
        count = sum(len(row["layers"]) + (len(sae.layers) > 1) for row in made)
        rows.append((len(sae.layers), count, seconds / max(count, 1)))
    return rows


def transferred(run: Path) -> tuple[int, int, float]:
    """Return latents, layers and CPU seconds of the transfer matrices of the widest group."""
    found = Interpretation(run / "interpretation")
    explainer, sae = Explainer(found), max(found.saes.values(), key=lambda sae: len(sae.layers))
    rows = found.explanations[sae.name]["latents"]
    seconds = 0.0
    for row in rows:
        firings = explainer.firings(sae, row["latent"])
        began = time.process_time()
        made = {a: rules_of(entry) for a, entry in [*row["layers"].items(), ("all", row["all"])]}
        holds = {a: predict(rules, explainer.scored).anywhere for a, rules in made.items()}
        for a, b in itertools.product(holds, holds):
            f1(holds[a], firings[b].truth.bits)
        transfer(row, sae.layers)
        seconds += time.process_time() - began
    return len(rows), len(sae.layers), seconds


def opened(page: Path) -> float | None:
    """Return the seconds until the list of a page is there, in Chromium; None without one."""
    if CHROMIUM is None:
        return None
    timed = page.with_name("timed.html")
    mark = "<script>document.title = `usable ${performance.now()}`</script></body>"
    timed.write_text(page.read_text(encoding="utf-8").replace("</body>", mark), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    found = []
    for _ in range(1 if smallest() else 3):
        done = subprocess.run(
            [CHROMIUM, *flags, timed.resolve().as_uri()],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        found.append(float(re.findall(r"<title>usable ([\d.]+)", done.stdout)[0]) / 1000)
    return sorted(found)[len(found) // 2]


def main() -> None:
    """Measure everything, and write the figures."""
    with tempfile.TemporaryDirectory() as output:
        wide = ["sae.expansion=null", f"sae.d_sae={LATENTS}"]
        run = trained(Path(output) / "run", *wide * smallest())
        figures = collected(run) if smallest() else in_a_child(run)
        interpret(run, *text(TOKENS // 5), f"interpretation.latents={4 if smallest() else 64}")
        times, (latents, depth, spent) = explained(run), transferred(run)
        if not smallest():
            run = trained(Path(output) / "wide", *wide)
            interpret(run, *text(TOKENS // 16), "interpretation.latents=4")
        page = run / "interpretation" / "index.html"
        size, seconds = page.stat().st_size, opened(page)
    megabytes = {name: f"{each / 1e6:.0f} MB" for name, each in figures["memory"].items()}
    cost = figures["seconds"]
    ratio = cost["collecting"] / cost["forward and encoding"]
    lines = [
        "| | measured | goal |",
        "|---|---|---|",
        f"| collecting, against forward and encoding, {figures['read']:,} tokens "
        f"({figures['timed']} parts timed) | {ratio:.2f} | 1.2 |",
        f"| memory as `dry_run` gives it | {megabytes['planned']} | |",
        f"| the process's growth after {FIRST:,} tokens | {megabytes['early']} | |",
        f"| after all | {megabytes['late']} | as before |",
    ]
    for layers, count, each in times:
        lines.append(
            f"| one explanation of {count}, SAE of {layers} layers, CPU | {each:.3f} s | 0.1 s |"
        )
    each = spent / max(latents * depth**2, 1)
    lines.append(
        f"| transfer matrices of 256 latents x 12 layers, from {latents} x {depth}, CPU "
        f"| {each * 256 * 12**2:.1f} s | 120 s |"
    )
    shown = "no Chromium" if seconds is None else f"{seconds:.2f} s"
    lines += [
        f"| a page of {2 * LATENTS:,} latents | {size / 1e6:.1f} MB | 50 MB |",
        f"| its list is there after | {shown} | 2 s |",
    ]
    write(
        "interpretation",
        "What looking into latents costs",
        "\n".join(lines),
        torch.device("cpu"),
        "Memory is the growth of the process after the first forward. The machine was shared.",
    )


if __name__ == "__main__":
    if GIVEN["collect"]:
        print(json.dumps(collected(Path(GIVEN["collect"]))))
    else:
        main()
