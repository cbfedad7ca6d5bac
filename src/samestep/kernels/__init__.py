"""Fast products and attention on each kind of processor."""
