"""Small arrays that are kept between large temporary ones do not hold the memory of these."""

import ctypes
import subprocess
import sys

import pytest

HOLES = """
import ctypes
import sys
import torch
from groupsae.runtime.memory import return_large_tensors

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]

if sys.argv[1] == "returned":
    return_large_tensors()
kept = []
large = torch.ones(7 * 2**20)  # freeing it raises glibc's limit to its 28 MiB
del large
for _ in range(40):
    logits = torch.ones(2 * 2**20)
    kept.append(torch.ones(3000))
    del logits
    half = torch.ones(2**18)
    kept.append(torch.ones(3000))
    del half
find = ctypes.CDLL(None).mallinfo2
find.restype = Heap
print(find().fordblks)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc's heap behaves so"
)
def test_freed_logits_leave_no_holes_in_the_heap() -> None:
    def holes(how: str) -> int:
        command = [sys.executable, "-c", HOLES, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert holes("returned") < holes("glibc's default") / 3
