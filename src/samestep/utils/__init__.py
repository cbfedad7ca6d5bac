"""Files, text and other helpers that know nothing of training."""
