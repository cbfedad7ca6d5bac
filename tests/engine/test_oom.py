"""Which errors are a want of memory, so that the batch is cut finer."""

import pytest
import torch

from samestep.engine.oom import memory_guard
from samestep.errors import OutOfMemoryError

MESSAGES = [
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
    "could not create a primitive",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_want_of_memory_names_the_tokens(message: str) -> None:
    micro = {"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2, 5).long()}
    told = pytest.raises(OutOfMemoryError, match="out of memory on 10 tokens in 2 sequences")
    with told, memory_guard(micro):
        raise RuntimeError(message)


def test_other_errors_of_the_device_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"), memory_guard({}):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `gemm`")
