"""Rows to micro-batches: loading, tokenisation, target masks, collation. See README.md."""

from samestep.utils.extras import require_installed

require_installed("train", what="samestep.data")  # before what the modules below import

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.row_formats import RowFormat
from samestep.data.rows import Row, RowError
from samestep.data.tokenize import tokenize_rows

__all__ = ["Example", "Examples", "Row", "RowError", "RowFormat", "load_rows", "tokenize_rows"]
