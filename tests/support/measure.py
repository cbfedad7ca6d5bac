"""How far a gradient moves when its batch is cut otherwise: samestep's, and a Trainer's."""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from gloo import on_ranks
from named import NAMED, Named, One
from torch import Tensor, nn

import samestep
from samestep.terms import Term, count

CUTS = ([8], [1] * 8, [3, 1, 4])


def gradient(named: Named, model: nn.Module, cut: Sequence[int], dtype: torch.dtype) -> Any:
    """The gradient of every weight that gets one."""
    examples, micros, at = named.examples(), [], 0
    for size in cut:
        micros.append(named.micro(examples[at : at + size], dtype))
        at += size
    samestep.backward(model, micros, samestep.CausalLMLoss())
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The relative difference of the whole gradients."""
    assert found.keys() == wanted.keys()
    error = sum(float((found[name] - w).double().square().sum()) for name, w in wanted.items())
    norm = sum(float(w.double().square().sum()) for w in wanted.values())
    return math.sqrt(error / norm)


def over_cuts(named: Named, dtype: torch.dtype) -> float:
    """The largest difference between the cuts."""
    model = named.build(dtype)
    found = [gradient(named, model, cut, dtype) for cut in CUTS]
    return max(apart(one, found[0]) for one in found[1:])


def own_half(index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """On one of two ranks: the gradient over both, each with its own half of the batch."""
    from samestep import ranks

    named = NAMED[index]
    model, examples = named.build(dtype), named.examples()
    own = examples[:3] if ranks.rank() == 0 else examples[3:]
    samestep.backward(model, [named.micro([one], dtype) for one in own], samestep.CausalLMLoss())
    return {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


def over_ranks(index: int, dtype: torch.dtype) -> float:
    """The difference of two ranks with 3 and 5 examples from one process."""
    named = NAMED[index]
    wanted = gradient(named, named.build(dtype), [8], dtype)
    return max(apart(found, wanted) for found in on_ranks(2, own_half, index, dtype))


def of_trainer(named: Named) -> float:
    """The difference of one plain SGD update of `transformers.Trainer`, 1 x 8 from 8 x 1."""
    from transformers import Trainer, TrainingArguments

    def collated(chosen: Sequence[One]) -> dict[str, Any]:
        micro = named.micro(chosen, torch.float32)
        return {name: micro[name] for name in micro if name != "example_ids"}

    updates = []
    for size, steps in ((8, 1), (1, 8)):
        model = named.build(torch.float32)
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=1,
                learning_rate=0.1,
                optim="sgd",
                lr_scheduler_type="constant",
                max_grad_norm=0,
                report_to=[],
                use_cpu=True,
                remove_unused_columns=False,
                save_strategy="no",
                disable_tqdm=True,
            )
            Trainer(model, arguments, collated, named.examples()).train()
        updates.append({name: before[name] - w.detach() for name, w in model.named_parameters()})
    return apart(updates[1], updates[0])


def mean_of_means(named: Named) -> float:
    """The difference that the classic mistake makes here, to show that it would be seen."""
    loss = samestep.CausalLMLoss()

    def wrong(model: nn.Module, micro: Any) -> Term:
        own = count([micro])["token"]
        return Term(loss(model, micro)["nll"].total / own, "micro-batch")

    model, examples = named.build(torch.float32), named.examples()
    wanted = gradient(named, model, [8], torch.float32)
    micros = [named.micro([one], torch.float32) for one in examples]
    samestep.backward(model, micros, wrong, counters={"micro-batch": lambda _: 1.0})
    found = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return apart(found, wanted)
