"""A checkpoint is a folder: one file per SAE, one for the rest, and a manifest that vouches for them."""
