"""The table that a dry run prints, as cells and numbers."""

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def rows_of(output: str) -> dict[str, list[str]]:
    """Return the table that a dry run printed: name -> cells."""
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]
    return {name: values for name, *values in cells}


def count(cell: str) -> float:
    """Return the number of a cell; bytes for one with a unit such as kB."""
    number, unit = cell.split()
    return float(number.replace(",", "")) * UNITS[unit]
