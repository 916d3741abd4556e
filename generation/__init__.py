"""Speaking: the decoding engine and the text around it. Knows nothing of training."""
