"""`samestep train`: from rows to a fine-tuned model."""
