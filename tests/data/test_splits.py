"""Documents keep their side of the split, and the shares are what was asked for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.data.packing import SPLITS, document_numbers, split_of


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_split_is_the_place_of_the_names_hash_among_the_shares(name, heldout, calibration):
    u = int(hashlib.sha256(name.encode("utf-8")).hexdigest()[:16], 16) / 2**64
    bounds = {"heldout": (0, heldout), "calibration": (heldout, heldout + calibration)}
    bounds["train"] = (heldout + calibration, 1)
    low, high = bounds[split_of(name, heldout, calibration)]
    assert low <= u < high


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_larger_share_never_releases_a_heldout_document(name, heldout, more):
    if split_of(name, heldout, 0.0) == "heldout":
        assert split_of(name, heldout + more, 0.0) == "heldout"


def test_the_shares_of_many_names_are_near_those_asked_for():
    found = [split_of(f"train#{i}", 0.1, 0.2) for i in range(5000)]
    shares = [found.count(split) / len(found) for split in SPLITS]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.02)  # five standard deviations


def test_known_names_stay_where_they_were_in_every_version():
    """The shipped language model never saw these: moving them would spoil its held-out set."""
    names = ["sched.py", "copyreg.py", "token.py", "typing.py", "json/decoder.py"]
    assert [split_of(name, 0.02, 0.02) for name in names] == [
        "heldout",
        "heldout",
        "calibration",
        "train",
        "train",
    ]


def test_a_blocks_document_is_the_one_it_begins_in():
    blocks = np.array([[5, 6, 1], [7, 0, 2], [3, 0, 0], [9, 9, 9], [0, 4, 4], [4, 4, 4]])
    assert document_numbers(blocks, eos=0).tolist() == [0, 0, 1, 3, 3, 4]


@pytest.mark.parametrize("eos", [None, 0])
def test_without_any_end_of_text_every_block_is_a_document(eos):
    assert document_numbers(np.ones((4, 3), np.int32), eos).tolist() == [0, 1, 2, 3]
