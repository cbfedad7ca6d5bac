"""The optimizer step: counts, terms, gradients and ranks. README.md names the stages and files."""
