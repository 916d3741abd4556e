"""The check-up on a CUDA device: python -m benchmarks.cuda."""
