"""What compiled CUDA kernels are made of, held against a committed budget: `python -m cuda_static --help` in tests/."""
