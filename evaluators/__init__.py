"""Evaluation of a run's outputs. Knows nothing of training or of Hydra."""
