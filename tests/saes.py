"""What every SAE and optimiser of the tests needs beside the values that a test is about."""

REST = {"d_sae": None, "tied": True, "k_start": None, "sparsity_warmup": 0.0}  # of a TopK
CONSTANT = {"warmup": 0.0, "decay": "constant", "decay_share": 0.0}  # of an Adam
