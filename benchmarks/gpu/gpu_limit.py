"""The limit of a device: how fast it multiplies large matrices in bfloat16; prints a JSON line."""

import argparse
import json
import time


def measure(device: str, size: int) -> dict[str, float]:
    """Floating-point operations a second, the best of some products."""
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
    return {"flops_per_second": 2.0 * size**3 / best}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    print(json.dumps(measure(options.device, 256 if options.tiny else 8192)))


if __name__ == "__main__":
    main()
