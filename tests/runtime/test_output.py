"""What is printed never ends a process, and is never markup."""

import io
import subprocess
import sys

import pytest
from rich.table import Table

from groupsae.runtime.output import screen

PROGRAM = r"""
import sys
from groupsae.runtime.output import never_fail_to_print
never_fail_to_print()
print("\u0394CE \u2501 \xfc", flush=True)
sys.stderr.write("\xfc\n")
for line in range(20_000):
    print(line)
sys.stdout.flush()
print("end", file=sys.stderr)
"""


def started(end: str = "", **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" {end}', sys.executable, PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **variables},
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_character_that_the_output_lacks_is_replaced(variables: dict[str, str]) -> None:
    out, err = started(**variables).communicate()
    assert out.startswith(b"?CE ? ?\n0\n1\n")
    assert err == b"\\xfc\nend\n"


def test_output_after_the_reader_has_left_is_dropped() -> None:
    with started(PYTHONUTF8="1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().decode() == "ΔCE ━ ü\n"
        process.stdout.close()
        assert process.stderr.read().decode() == "ü\nend\n"
        assert process.wait() == 0


@pytest.mark.parametrize("end", [">&-", ">/dev/full"])
def test_a_closed_or_full_output_ends_nothing(end: str) -> None:
    process = started(end, PYTHONUTF8="1")
    _, err = process.communicate()
    assert (process.returncode, err.decode()) == (0, "ü\nend\n")


def test_brackets_colons_and_braces_are_printed_as_they_are() -> None:
    out, name = io.StringIO(), "exp[v2]/[bold]x[/bold]/:smile:{a}"
    console = screen(file=out)
    console.print(name)
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    assert out.getvalue().count(name) == 4
