"""Pretrains the bundled language model: `python -m benchmarks.pretraining`, hours."""
