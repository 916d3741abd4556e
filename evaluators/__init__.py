"""Measuring: what a run's outputs are worth. Knows nothing of training, of generation or of Hydra."""
