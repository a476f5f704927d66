"""Activations on disk: written once, read by everything that needs them."""
