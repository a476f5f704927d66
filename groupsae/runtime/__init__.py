"""Errors, ranks, retries, progress, units, secrets, and private parts of other libraries."""
