"""Timings of the fused operators against plain PyTorch on named shapes and real data: `python -m benchmarks --help`."""
