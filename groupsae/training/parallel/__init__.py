"""Several processes: who owns which SAE, how they talk, and what becomes of a run that loses one."""
