"""Errors, ranks, retries, progress and secrets: what every room may use."""
