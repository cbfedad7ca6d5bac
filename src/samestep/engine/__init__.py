"""The step: terms, units, counts, gradients, ranks, one update. It knows no trainer and no data."""
