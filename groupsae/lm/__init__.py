"""Language models: load frozen, hook."""

from pathlib import Path

BUNDLED = {"tiny": Path(__file__).parent.parent / "models" / "tiny"}  # models by their names
