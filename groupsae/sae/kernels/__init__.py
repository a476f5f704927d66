"""Sums over the active latents, one module for each way to do them."""
