"""Output of other libraries is silenced; our own warnings are sentences."""

import warnings

import pytest

from groupsae.runtime import quiet


def test_our_warnings_are_sentences_and_others_keep_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    with warnings.catch_warnings():
        quiet.quiet()
        quiet.quiet()  # the next run of a sweep
        ours = warnings.formatwarning("measured again", UserWarning, quiet.__file__, 3)
        theirs = warnings.formatwarning("of somebody else", UserWarning, "/else/where.py", 7)
    assert ours == "warning: measured again\n"
    assert theirs == "/else/where.py:7: UserWarning: of somebody else\n"
