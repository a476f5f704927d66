"""Several processes: who owns which SAE, how they talk, what happens when one is lost."""
