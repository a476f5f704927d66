"""LightningModules, callbacks and the cost model."""
