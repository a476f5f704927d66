"""Who takes part in which part of the measurement, and how its process is started."""

import sys
from pathlib import Path
from typing import NamedTuple

OURS = "groupsae"
BASE = "sparsify, Adam"  # what all others are compared with
LM_ALONE = "language model alone"
HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / "outputs" / "rivals"
TUNED = {  # glibc's allocator keeps what is freed, as groupsae sets it for itself
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
PARTS = ("S1", "S1-tuned", "S2", "S2-tuned", "loop", "loop-tuned")
SHARED = [
    "groups=explicit",
    "groups.groups=[[0,1,2],[3,4,5]]",
    "groups.last_layer=group",
]


class Contender(NamedTuple):
    """One process: its name in the table, the library, and the worker's arguments."""

    name: str
    library: str
    arguments: list[str]

    def command(self) -> list[str]:
        """Return what starts the worker."""
        own = ENVIRONMENTS / self.library / "bin" / "python"
        python = sys.executable if self.library == OURS else str(own)
        return [python, str(HERE / f"worker_{self.library}.py"), *self.arguments]


def contenders(part: str, lm: Path, also: list[list[str]]) -> list[Contender]:
    """Return who is measured in a part.

    Args:
        part: one of `PARTS`.
        lm: folder of the language model of the whole loop.
        also: each a list of overrides, with which groupsae is measured once more.
    """
    shape, _, tuned = part.partition("-")
    if shape == "loop":
        ours, single = ["loop", str(lm), "ours"], "groups=per_layer"
        as_it_is = Contender(
            f"{OURS}, 6 SAEs, plain malloc", OURS, ["loop", str(lm), "plain", single]
        )
        return [
            Contender(LM_ALONE, OURS, ["lm", str(lm), "ours"]),
            Contender(f"{OURS}, 6 SAEs", OURS, [*ours, single]),
            *([] if tuned else [as_it_is]),
            *(
                Contender(f"{OURS}, 6 SAEs, {' '.join(each)}", OURS, [*ours, single, *each])
                for each in also
            ),
            Contender(f"{OURS}, 2 SAEs of 3 layers each", OURS, [*ours, *SHARED]),
            Contender(BASE, "sparsify", ["loop", str(lm)]),
        ]
    # what only changes the language model or the stream is not seen here
    changed = [each for each in also if any(x.startswith(("sae", "optim")) for x in each)]
    plain = [] if tuned else [Contender(f"{OURS}, plain malloc", OURS, [shape, "plain"])]
    return [
        Contender(OURS, OURS, [shape, "ours"]),
        *(Contender(f"{OURS}, {' '.join(x)}", OURS, [shape, "ours", *x]) for x in changed),
        *plain,
        Contender(BASE, "sparsify", [shape, "adam"]),
        Contender("sparsify, its default (signum)", "sparsify", [shape, "signum"]),
        Contender("dictionary_learning", "dictionary_learning", [shape]),
        Contender("SAELens", "saelens", [shape]),
    ]


def versions() -> dict[str, str]:
    """Return library -> what its requirement file pins, such as `sae-lens 6.54.12`."""
    found = {}
    for file in sorted(HERE.glob("*.txt")):
        lines = [x for x in file.read_text().splitlines() if not x.startswith("#")]
        found[file.stem] = lines[0].replace("==", " ")
    return found
