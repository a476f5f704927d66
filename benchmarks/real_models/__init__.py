"""The tool on real pretrained models: `python -m benchmarks.real_models`."""
