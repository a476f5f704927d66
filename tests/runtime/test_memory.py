"""Small arrays that are kept between large temporary ones do not hold the memory of these."""

import platform
import subprocess
import sys

import pytest

GROWTH = """
import sys
import torch
from pathlib import Path
from groupsae.runtime.memory import return_large_tensors

def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 10**6

if sys.argv[1] == "returned":
    return_large_tensors()
kept = []
large = torch.ones(7 * 2**20)  # freeing it raises glibc's limit to its 28 MiB
del large
before = megabytes()
for _ in range(40):
    logits = torch.ones(2 * 2**20)
    kept.append(torch.ones(3000))
    del logits
    half = torch.ones(2**18)
    kept.append(torch.ones(3000))
    del half
print(megabytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap behaves so")
def test_freed_logits_leave_no_holes_in_the_heap() -> None:
    def growth(how: str) -> int:
        command = [sys.executable, "-c", GROWTH, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert growth("returned") < growth("glibc's default") / 3
