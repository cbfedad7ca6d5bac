"""`samestep study`: batch configurations side by side, measured by the same metrics."""
