"""A run's files: checkpoints, metrics logs, plots and reports. Knows no training and no generation."""
