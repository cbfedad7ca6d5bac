"""The limit of a device: how fast it multiplies large matrices in bfloat16."""

import time


def measure(device: str, size: int) -> float:
    """Floating-point operations a second, the best of some products.

    Args:
        device: Where.
        size: Of the square matrices.

    Returns:
        The best.
    """
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device != "cpu":
            torch.accelerator.synchronize()
        best = min(best, (time.perf_counter() - began) / 4)
    return 2.0 * size**3 / best
