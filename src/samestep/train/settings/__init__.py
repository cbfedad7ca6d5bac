"""Settings of `samestep train`: fields and their contradictions, without PyTorch."""
