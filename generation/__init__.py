"""Inference: the decoding engine and the text around it. Knows nothing of training."""

from generation.loading import load

__all__ = ["load"]
