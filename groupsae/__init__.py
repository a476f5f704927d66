"""Group-SAE: one sparse autoencoder per group of similar layers (arXiv 2410.21508)."""
