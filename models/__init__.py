"""Tensors in, tensors out: layers, recursions, ACT, losses, KV cache. Knows no files, no text, no Hydra and no W&B."""
