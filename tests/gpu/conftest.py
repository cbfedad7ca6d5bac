"""All tests of a GPU share a process, whose first product is where cuBLAS reads the environment."""

from samestep.utils.cublas import let_cublas_repeat

let_cublas_repeat()
