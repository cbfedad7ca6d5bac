"""What the ranks of the test of `samestep.windows` do: importable, so that a process finds it."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import samestep


def window_gradients(rows: int, batch: int, steps: int, *, apply: bool = True) -> list[list[float]]:
    """The gradient of each update of an epoch over ragged rows, on this rank."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29612"}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(1, 1).double()
    data = [torch.arange(1.0, 2.0 + at, dtype=torch.float64) for at in range(rows)]
    pad = nn.utils.rnn.pad_sequence
    loader = torch.utils.data.DataLoader(
        data, batch, collate_fn=lambda some: pad(some, batch_first=True)
    )
    model, loader = accelerator.prepare(model, loader)
    pairs = ((micro, 1.0) for micro in loader)
    if apply:
        pairs = samestep.windows(loader, accelerator, unit=lambda micro: (micro > 0).sum())
    seen = []
    for micro, factor in pairs:
        with accelerator.accumulate(model):
            loss = model(micro[micro > 0].unsqueeze(1)).square().mean()
            accelerator.backward(loss * factor)
            if accelerator.sync_gradients:
                seen.append([float(weight.grad) for weight in model.parameters()])
                model.zero_grad()
    return seen
