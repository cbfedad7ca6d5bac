"""The axes: what may not change the step, each measured and judged by itself."""
