"""Diagnoses: from experiments on an inexact axis to the name of a cause, with evidence."""
