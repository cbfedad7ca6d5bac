"""samestep.step inside DistributedDataParallel: any rank may hold any part of the batch.

    torchrun --nproc-per-node 2 examples/ddp.py

The ranks hold unequal parts of the effective batch, of ragged rows. Counts are added up over the
ranks before any backward, so the printed losses are those of one process (run it without torchrun
to see). The loss gets the module inside DDP, so it is that of `own_loop.py`, unchanged.
"""

import os
import time

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import samestep
from own_loop import NextToken, loss_fn, pad, ragged_rows

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rows(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's rows: rank 0 takes three in four; the others share the rest."""
    if WORLD_SIZE == 1:
        return rows
    first = 3 * len(rows) // 4
    return rows[:first] if RANK == 0 else rows[first:][RANK - 1 :: WORLD_SIZE - 1]


def main() -> None:
    """Ten steps."""
    torch.manual_seed(0)
    model: torch.nn.Module = NextToken()
    if WORLD_SIZE > 1:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = local_rows(ragged_rows(32))
    for step in range(10):
        micro_batches = [pad(rows[start : start + 5]) for start in range(0, len(rows), 5)]
        report = samestep.step(model, optimizer, micro_batches, loss_fn, max_grad_norm=1.0)
        if RANK == 0:
            print(
                f"step {step + 1:2}  loss {report.loss:.6f}  {report.counts['token']:.0f} targets"
            )
    if WORLD_SIZE > 1:
        # PyTorch's communication threads drop their last tensors with Python's lock; a process that
        # ends before they have it is aborted, after all its work. Sleeping lends it to them.
        time.sleep(0.5)
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
