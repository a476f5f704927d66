"""Numbers as people read them."""

from groupsae.runtime.units import format_bytes, format_seconds


def test_bytes_have_the_unit_that_fits():
    assert [format_bytes(n) for n in (12, 1_234, 5.6e6, 7.89e9, 1.5e13)] == [
        "12 B",
        "1.23 kB",
        "5.6 MB",
        "7.89 GB",
        "15.00 TB",
    ]


def test_seconds_are_rounded():
    assert [format_seconds(s) for s in (0.4, 59.6, 90_061)] == [
        "0:00:00",
        "0:01:00",
        "1 day, 1:01:01",
    ]
