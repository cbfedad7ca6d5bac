"""Models: loading them, and making their forward independent of the split."""
