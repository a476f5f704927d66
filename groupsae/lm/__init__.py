"""Language models: build, load, hook."""
