"""Objectives: callables (model, micro-batch) to terms, a file a topic.

Each class declares in ``counters`` how its units are counted that the step does not count by itself
(`samestep.engine.counts.count_labels`); `samestep.Objective` takes a loss with its counters.
"""
