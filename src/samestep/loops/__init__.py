"""Loops of accelerate and Lightning made exact: each micro-batch's mean loss times a factor."""
