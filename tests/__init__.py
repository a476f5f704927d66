"""Tests, by room of the package."""
