"""A GPU is never waited for in counting a step, nor between its first and last micro-batch.

There is no GPU here, so a step runs on the meta device: like a GPU it computes shapes at once and
values later (here never), and whoever asks for a value fails. Copies from the CPU must not wait
either.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import build, cut, ragged
from experts import FAMILIES
from objective_runs import CASES, configured, latents, pictures
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GotOcr2Processor

import samestep
from samestep.data.collate import collate_examples, to_device
from samestep.engine import two_pass
from samestep.engine.normalize import TermAccumulator
from samestep.engine.parallel import prepare_for_step
from samestep.engine.step import accumulate, count_batch
from samestep.engine.targets import class_positions
from samestep.engine.terms import Counts, LossFn
from samestep.engine.two_pass import GatheredTerms
from samestep.kernels import packed_attention, varlen
from samestep.models.probes import cut_last_layer
from samestep.objectives.routers import _RoutedTokens
from samestep.train.forward import with_keyed_dropout
from samestep.train.run_data import step_plans
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import set_up

META = torch.device("meta")


class NoWaitingCopies(TorchDispatchMode):
    """Refuses copies from the CPU that block."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META:
            assert args[0].is_meta or kwargs.get("non_blocking"), "a copy that waits"
        return func(*args, **kwargs)


def as_on_a_gpu(pack: varlen.Pack) -> torch.Tensor:
    """Attention by FlashAttention."""
    function = varlen.flash_function()
    assert function is not None
    return varlen.by_flash(function, pack)


def counted_there(micro_batches: list[Any], counters: Any) -> tuple[list[Any], Counts]:
    """Micro-batches on the meta device, and their counts, which are those on the CPU."""
    there = [to_device(micro_batch, META) for micro_batch in micro_batches]
    with NoWaitingCopies():
        counted = count_batch(there, counters)[1:]
    assert counted == count_batch(list(map(dict, micro_batches)), counters)[1:]
    assert any(counted[0].values())
    return there, counted[0]


def run_there(
    model: Any,
    micro_batches: list[Any],
    loss: LossFn,
    *,
    counters: Any = None,
    frozen: Sequence[nn.Module] = (),
) -> None:
    """A step's forwards and backwards on the meta device, after one on the CPU.

    The first looks at the model's head, once for good.
    """
    samestep.backward(model, micro_batches, loss, counters=counters)
    for module in (model, *frozen):
        module.to(META)
    there, counts = counted_there(micro_batches, counters)
    with pytest.MonkeyPatch.context() as patch, NoWaitingCopies():
        patch.setattr(packed_attention, "_by_sequence", as_on_a_gpu)
        patch.setattr(torch, "Generator", lambda device: torch.default_generator)
        # These read values, once a step: after the last micro-batch, and between two passes.
        patch.setattr(TermAccumulator, "totals", lambda self: {})
        patch.setattr(GatheredTerms, "check_repeated", lambda *_, **__: None)
        patch.setattr(two_pass, "_check_value", lambda name, value: None)
        _, _, gradients = accumulate(
            model,
            prepare_for_step(model),
            micro_batches=there,
            loss_fn=loss,
            counts=counts,
            normalize="token",
        )
    assert gradients
    assert all(gradient.is_meta for gradient in gradients.values())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_packs(name: str, weighted: bool) -> None:
    model = build(name, torch.float32)
    assert cut_last_layer(model, "none")
    micro_batches = cut(model, ragged(12, weighted=weighted, by_token=weighted), [5], "none")
    run_there(model, micro_batches, samestep.CausalLMLoss(z_loss=1e-3, label_smoothing=0.1))


PACKED = [case for case in CASES if not case.endswith(("bert", "t5", *FAMILIES))]
"""Without those whose model waits: of a padded batch transformers asks whether it is padded, and
experts how many tokens go to each."""


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", PACKED)
def test_objectives(tmp_path: Path, case: str) -> None:
    # Adapters: with dropout, and the model without them as the reference.
    adapters = {"lora_rank": 2, "lora_dropout": 0.1}
    config: TrainSettings = configured(tmp_path, case, eval_data=None, **adapters)
    run = set_up(config)
    plan = next(step_plans(run.train, config))
    micro_batches = list(run.micro_batches.of_this_rank(plan.examples, 0))
    teachers = [own for own in vars(run.objective.loss_fn).values() if isinstance(own, nn.Module)]
    loss = with_keyed_dropout(run.objective.loss_fn, seed=0, step=0)
    run_there(run.model, micro_batches, loss, counters=run.objective.counters, frozen=teachers)


OTHERS = {case: partial(configured, case=case) for case in CASES if case not in PACKED}
OTHERS |= {"vision_language": pictures, "flow_matching": latents}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", OTHERS)
def test_counting_every_objective(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that cannot run on the meta device."""
    # The one setting of this processor that a folder does not keep.
    monkeypatch.setattr(GotOcr2Processor, "num_image_tokens", 16)
    run = set_up(OTHERS[case](tmp_path))
    micro_batches = list(run.micro_batches.batches(range(8), 0))
    run.micro_batches.device = META
    there = list(run.micro_batches.batches(range(8), 0))
    _, counts = counted_there(micro_batches, run.objective.counters)
    assert count_batch(there, run.objective.counters)[1] == counts
    for name in {"classes", "targets"} & micro_batches[0].get("fields", {}).keys():
        found = class_positions(there[0], name)
        assert found.is_meta
        assert found.shape == class_positions(dict(micro_batches[0]), name).shape
    if case.endswith(tuple(FAMILIES)):
        assert _RoutedTokens.of(there[0]).positions.is_meta


def test_counting_on_the_device_is_caught() -> None:
    micro = to_device(collate_examples(ragged(4)), META)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        count_batch([dict(micro)], None)
    micro["labels"] = micro["labels"].clone()  # not what the data hold, perhaps
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        count_batch([micro], None)


@pytest.mark.parametrize("wrong", ["collated by others", "a value read"])
def test_waits_are_caught(wrong: str) -> None:
    model = build("llama", torch.float32)
    micro_batches, loss = cut(model, ragged(12), [5], "none"), samestep.CausalLMLoss()

    def reading(model: nn.Module, micro_batch: Mapping[str, Any]) -> Any:
        terms = loss(model, micro_batch)
        assert terms["nll"].total.item() >= 0
        return terms

    if wrong == "collated by others":
        for micro_batch in micro_batches:
            del micro_batch["target_positions"]
    with pytest.raises(RuntimeError, match="meta"):
        run_there(model, micro_batches, reading if wrong == "a value read" else loss)


class Reads(TorchDispatchMode):
    """Counts how often a tensor's values are asked for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.number = 0
        real = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self.number += 1
            return real(tensor)

        patch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        asks = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)
        self.number += func.overloadpacket in asks
        return func(*args, **(kwargs or {}))


def test_a_step_reads_its_terms_and_the_norm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, rows: torch.Tensor) -> Mapping[str, samestep.Term]:
        found = model(rows)
        return {
            "square": samestep.Term(found.square().sum(), "row"),
            "size": samestep.Term(found.abs().sum(), "row", weight=0.1),
            "mean": samestep.Term(found.detach().sum(), "row", weight=0.0),
        }

    with monkeypatch.context() as patch, Reads(patch) as reads:
        report = samestep.step(
            *(model, optimizer, torch.randn(10, 3).split(2), loss),
            counters={"row": len},
            max_grad_norm=0.1,
            check_sums=False,
        )
    assert report.micro_batches == 5
    assert len(report.terms) == 3
    assert reads.number == 2
