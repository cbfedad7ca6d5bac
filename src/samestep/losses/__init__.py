"""Losses: pure tensor functions that sum over targets and never divide by a count.

From a head's input or its logits to one number, or to a number for each target, example or pair:

- `samestep.losses.linear_cross_entropy` and `samestep.losses.cross_entropy`: summed cross entropy
  from hidden states, from given logits, or through any head module;
- `samestep.losses.likelihood`: the log likelihood of every target by itself, for objectives that
  weigh or compare targets (`samestep.losses.preference`, `samestep.losses.policy`);
- `samestep.losses.distillation`: divergences between a student's and a teacher's distributions;
- `samestep.losses.per_example`: classes, values and contrasted embeddings;
- `samestep.losses.router`: load balance and z-loss of a mixture of experts;
- `samestep.losses.logits`: what these share: the precision of logits, their soft cap, a chunk of
  rows at a time, and the backward of a linear head.

Import each function from the module that defines it.
"""
