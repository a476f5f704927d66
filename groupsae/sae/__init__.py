"""Sparse autoencoders as plain modules."""
