"""Checks and benchmarks on a CUDA device: python -m benchmarks.cuda."""
