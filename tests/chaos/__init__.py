"""Runs with a fault in them."""
