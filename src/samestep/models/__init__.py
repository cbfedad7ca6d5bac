"""Models: loading them, and running their forward so that it does not depend on the split."""
