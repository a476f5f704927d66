"""A checkpoint is a folder: a file for each SAE, one for the rest, and a manifest."""
