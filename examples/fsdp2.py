"""samestep.step over weights that FSDP2 (`fully_shard`) shards over the ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Compare the printed losses with those of `ddp.py`, on any number of ranks. Ranks may hold different
numbers of micro-batches; the step gives each of them the same number of backwards.
"""

import time

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

import samestep
from ddp import RANK, local_rows
from own_loop import NextToken, loss_fn, pad, ragged_rows


def main() -> None:
    """Ten steps."""
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = NextToken()
    # In a real model: every block, then the root. The head must stay in the root's group, because
    # the loss applies its weight by itself.
    fully_shard(model.embed)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # after fully_shard: over the shards
    rows = local_rows(ragged_rows(32))
    for step in range(10):
        micro_batches = [pad(rows[start : start + 5]) for start in range(0, len(rows), 5)]
        report = samestep.step(model, optimizer, micro_batches, loss_fn, max_grad_norm=1.0)
        if RANK == 0:
            print(
                f"step {step + 1:2}  loss {report.loss:.6f}  {report.counts['token']:.0f} targets"
            )
    # PyTorch's communication threads drop their last tensors with Python's lock; a process that
    # ends before they have it is aborted, after all its work. Sleeping lends it to them.
    time.sleep(0.5)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
