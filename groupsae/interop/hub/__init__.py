"""Suites on the Hugging Face Hub."""
