"""Rows to examples: loading, tokenisation and target masks."""

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.rows import Row
from samestep.data.tokenize import tokenize_rows

__all__ = ["Example", "Examples", "Row", "load_rows", "tokenize_rows"]
