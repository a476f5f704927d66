"""The old name of `python -m groupsae.import_saes`."""

import runpy
import sys


def main() -> None:
    """Run `groupsae.import_saes`, after a note that names it."""
    print("note: groupsae.adopt is now groupsae.import_saes", file=sys.stderr)
    runpy.run_module("groupsae.import_saes", run_name="__main__")


if __name__ == "__main__":
    main()
