"""samestep.step inside DistributedDataParallel: any rank may hold any part of the batch.

    torchrun --nproc-per-node 2 examples/ddp.py

The ranks hold unequal parts of the effective batch, of ragged rows. Counts are added up over the
ranks before any backward, so the printed losses are those of one process (run it without torchrun
to see). The loss gets the module inside DDP, so it is that of `own_loop.py`, unchanged.
"""

import os

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import samestep
from own_loop import NextToken, loss_fn, pad, ragged_rows

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def my_part(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Rank 0 takes three rows in four; the others share the rest."""
    if RANKS == 1:
        return rows
    first = 3 * len(rows) // 4
    return rows[:first] if RANK == 0 else rows[first:][RANK - 1 :: RANKS - 1]


def main() -> None:
    """Ten steps."""
    torch.manual_seed(0)
    model: torch.nn.Module = NextToken()
    if RANKS > 1:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mine = my_part(ragged_rows(32))
    for step in range(10):
        micros = [pad(mine[start : start + 5]) for start in range(0, len(mine), 5)]
        report = samestep.step(model, optimizer, micros, loss_fn, max_grad_norm=1.0)
        if RANK == 0:
            print(
                f"step {step + 1:2}  loss {report.loss:.6f}  {report.counts['token']:.0f} targets"
            )
    if RANKS > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
