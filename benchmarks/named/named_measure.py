"""Measures on a reduced model: the gradient under every split, on two ranks, and in Trainer.

The reduced models and their rows are those of the tests (tests/support).
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import build, gradients, ragged
from cases import cut as cut_tokens
from experts import FAMILIES as MIXTURES
from experts import build_experts
from gloo import on_ranks
from torch import Tensor, nn

import samestep
from samestep.engine import collectives
from samestep.engine.counts import count_units
from samestep.engine.terms import Counter

NUMBER = 8
SPLITS: list[tuple[list[int], Any]] = [([1], "right"), ([2], "left"), ([3, 1], "none")]


@dataclass(frozen=True)
class Reduced:
    """A reduced model with the rows that it is measured on.

    Attributes:
        model: Builds it, from the same random weights every time.
        cut: Cuts rows: (model, indices, sizes, layout) to micro-batches.
        loss_fn: What is optimised.
        counters: Of its units.
    """

    model: Callable[[torch.dtype], Any]
    cut: Callable[[Any, Sequence[int], Sequence[int], Any], list[dict[str, Any]]]
    loss_fn: Any
    counters: dict[str, Counter]


def reduced(kind: str) -> Reduced:
    """The reduced model of a row of docs/models.md."""
    if kind.startswith("vision "):
        return _vision(kind.removeprefix("vision "))
    if kind == "video":
        return _video()
    examples = ragged(NUMBER)

    def cut(model: Any, indices: Sequence[int], sizes: Sequence[int], layout: Any) -> list[Any]:
        return cut_tokens(model, [examples[at] for at in indices], sizes, layout)

    loss_fn: Any = samestep.CausalLMLoss()
    if kind in MIXTURES:
        from samestep.objectives.routers import RouterLosses

        balance = "sequence" if kind == "deepseek_v3" else "window"
        loss_fn = RouterLosses(loss_fn, balance)  # type: ignore[arg-type]
        loss_fn = samestep.TwoPass(loss_fn) if balance == "window" else loss_fn
    builder = build_experts if kind in MIXTURES else build
    return Reduced(lambda dtype: builder(kind, dtype), cut, loss_fn, {})


def _vision(family: str) -> Reduced:
    from vision import build_vision, write_illustrated_rows

    from samestep.data.load import load_rows
    from samestep.data.readers.vision import collate_image_records, image_records

    folder = Path(tempfile.mkdtemp())
    path = write_illustrated_rows(folder, NUMBER, plain=5)
    _, processor = build_vision(family)
    records = image_records(load_rows(str(path)), processor, folder=folder)

    def cut(model: Any, indices: Sequence[int], sizes: Sequence[int], layout: Any) -> list[Any]:
        side = "right" if layout == "none" else layout
        return [
            collate_image_records(records, part, padding=side, pad_id=1, dtype=model.dtype)
            for part in _parts(indices, sizes)
        ]

    return Reduced(lambda dtype: build_vision(family, dtype)[0], cut, samestep.CausalLMLoss(), {})


def _video() -> Reduced:
    from diffusion import build_video, write_latents

    from samestep.data.readers.latents import collate_latents, latent_records
    from samestep.objectives.flow_matching import (
        FLOW_MATCHING_COUNTERS,
        FlowMatching,
        TimestepSampler,
    )

    records = latent_records(str(write_latents(Path(tempfile.mkdtemp()) / "latents", NUMBER)))

    def cut(model: Any, indices: Sequence[int], sizes: Sequence[int], layout: Any) -> list[Any]:
        return [
            collate_latents(records, part, key=(0, 0), time=TimestepSampler())
            for part in _parts(indices, sizes)
        ]

    return Reduced(build_video, cut, FlowMatching(), FLOW_MATCHING_COUNTERS)


def _parts(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    left, turn, parts = list(indices), 0, []
    while left:
        size = sizes[turn % len(sizes)]
        parts.append(left[:size])
        left, turn = left[size:], turn + 1
    return parts


def gradient(model: nn.Module) -> Tensor:
    """The whole gradient, as one vector in float64."""
    return torch.cat([one.double().flatten() for one in gradients(model).values()])


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((found - wanted).norm() / wanted.norm())


def _whole(case: Reduced, dtype: torch.dtype) -> tuple[Any, Tensor]:
    model = case.model(dtype)
    micros = case.cut(model, range(NUMBER), [NUMBER], "right")
    samestep.backward(model, micros, case.loss_fn, counters=case.counters)
    return model, gradient(model)


def over_splits(kind: str, dtype: torch.dtype) -> float:
    """The largest relative difference of the gradient between the whole batch and its splits."""
    case = reduced(kind)
    model, wanted = _whole(case, dtype)
    differences = []
    for sizes, layout in SPLITS:
        micros = case.cut(model, range(NUMBER), sizes, layout)
        samestep.backward(model, micros, case.loss_fn, counters=case.counters)
        differences.append(relative(gradient(model), wanted))
    return max(differences)


def of_this_rank(kind: str) -> Tensor:
    """What a rank makes of its part of the batch, most of which rank 0 holds; float32."""
    case = reduced(kind)
    model = case.model(torch.float32)
    own = range(NUMBER)[:5] if collectives.rank() == 0 else range(NUMBER)[5:]
    samestep.backward(
        model, case.cut(model, own, [2], "right"), case.loss_fn, counters=case.counters
    )
    return gradient(model)


def over_ranks(kind: str) -> float:
    """The relative difference between one process and two ranks, in float32."""
    _, wanted = _whole(reduced(kind), torch.float32)
    return max(relative(found, wanted) for found in on_ranks(2, of_this_rank, kind))


def in_trainer(kind: str) -> float:
    """What `transformers.Trainer` makes of the same rows as 1 x 8 instead of 8 x 1, in float32.

    For the model of diffusers, which Trainer cannot run: a loop that divides every micro-batch of 3
    and 1 in turn by its own number of examples, and averages.
    """
    case = reduced(kind)
    if kind == "video":
        model, wanted = _whole(case, torch.float32)
        micros = case.cut(model, range(NUMBER), [3, 1], "right")

        def mean(model: Any, micro: Any) -> samestep.Term:
            own = count_units([micro], case.counters)["example"]
            return samestep.Term(case.loss_fn(model, micro)["velocity"].total / own, "part")

        samestep.backward(model, micros, mean, counters={"part": lambda _: 1.0})
        return relative(gradient(model), wanted)
    return relative(_trained(case, 1, NUMBER), _trained(case, NUMBER, 1))


def _trained(case: Reduced, size: int, accumulation: int) -> Tensor:
    from transformers import Trainer, TrainingArguments

    model = case.model(torch.float32)
    config = model.config.get_text_config()
    if "router_aux_loss_coef" in config.to_dict():
        config.output_router_logits = True

    def collated(rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        indices = [row["at"] for row in rows]
        micro = case.cut(model, indices, [len(indices)], "right")[0]
        return {**samestep.model_inputs(micro), "labels": micro["labels"]}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: kept.append(gradient(model)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"at": at} for at in range(NUMBER)],
            data_collator=collated,
            optimizers=(optimizer, None),
        )
        trainer.train()
    assert len(kept) == 1
    return kept[0]
