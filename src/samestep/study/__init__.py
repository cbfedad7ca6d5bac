"""`samestep study`: batch configurations side by side, measured by one yardstick."""
