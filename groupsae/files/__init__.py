"""Atomic writes, locks, and reading the files of a run."""
