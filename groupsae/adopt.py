"""The old name of `python -m groupsae.import_saes`."""

import sys

from groupsae import import_saes


def main() -> None:
    """Start `groupsae.import_saes`, after a note that names it."""
    print("note: groupsae.adopt is now groupsae.import_saes", file=sys.stderr)
    import_saes.main()


if __name__ == "__main__":
    main()
