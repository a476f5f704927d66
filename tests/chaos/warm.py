"""Has imported the complete program, and forks one process for each command it gets.

More than half of a small run is importing. A line of the input is JSON: `arguments`, `fault` (as
faulty.py takes it), and `place`, whose `.out` gets what the command says, `.pid` its number and
`.status` what it ended with.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import groupsae.app.evaluate
import groupsae.app.fit  # noqa: F401
from groupsae.train import main
from tests.chaos import faulty


def command(order: dict) -> None:
    """Be the command: a session of its own, as it would have in a terminal of its own."""
    os.setsid()
    out = os.open(f"{order['place']}.out", os.O_WRONLY | os.O_CREAT)
    for handle, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
        os.dup2(handle, target)
    sys.argv = [faulty.__file__, *order["arguments"]]
    status = 1
    try:
        faulty.install(order["fault"])
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch(order: dict) -> None:
    """Start a command and note what it ends with."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        command(order)
    place = Path(order["place"])
    place.with_suffix(".pid").write_text(str(pid))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    place.with_suffix(".tmp").write_text(str(status))
    place.with_suffix(".tmp").rename(place.with_suffix(".status"))
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    for line in sys.stdin:
        if os.fork() == 0:
            watch(json.loads(line))
