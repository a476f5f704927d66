"""Language models: build, load frozen, hook."""
