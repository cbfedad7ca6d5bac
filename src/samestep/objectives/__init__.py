"""Objectives: functions of (model, micro-batch) that return terms."""
