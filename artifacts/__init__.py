"""What a run leaves on disk: the checkpoint folder (write and read) and the metrics log. Knows no training and no generation."""
