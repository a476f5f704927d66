"""LightningModules, callbacks and the ledger of costs."""
