"""What only a GPU can show; skipped without one. `benchmarks/gpu/gpu_run.py` runs these."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import build, cut, gradients, ragged, worst
from runs import llama_folder, run_config
from safetensors.torch import load_file
from torch import Tensor

import samestep
from samestep.data.collate import collate_examples, to_device
from samestep.engine.normalize import TermAccumulator
from samestep.engine.parallel import prepare_for_step
from samestep.engine.step import accumulate, count_batch
from samestep.kernels import varlen
from samestep.kernels.packed_attention import _by_sequence
from samestep.kernels.varlen import Pack, attend
from samestep.models import activations
from samestep.models.compiled import compiled_layers
from samestep.models.dropout import ExampleDropout, key_dropout, replace_dropout
from samestep.objectives.language import DFT
from samestep.train import trainer
from samestep.train.ahead import pinned
from samestep.train.forward import with_keyed_dropout
from samestep.train.setup import set_up
from samestep.train.trainer import train
from samestep.utils.cublas import SETTING, VALUE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("default"),
]

GPU = torch.device("cuda", 0)

SPLITS = [([24], "none"), ([1] * 24, "none"), ([7, 2], "none"), ([5], "right"), ([24], "left")]


def gradient(model: Any, sizes: list[int], padding: Any) -> dict[str, Tensor]:
    micros = [to_device(one, GPU) for one in cut(model, ragged(24), sizes, padding)]
    samestep.backward(model, micros, samestep.CausalLMLoss())
    return gradients(model)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_no_split_changes_the_gradient(dtype: torch.dtype, bound: float) -> None:
    model = build("llama", dtype).to(GPU)
    wanted = gradient(build("llama").to(GPU), [24], "none")
    for sizes, padding in SPLITS:
        found = {name: one.double() for name, one in gradient(model, sizes, padding).items()}
        assert worst(found, wanted) < bound, (sizes, padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("width", [24, 5, 264])
def test_kernels_of_packs_are_the_attention_of_each_sequence(
    dtype: torch.dtype, window: int | None, heads: tuple[int, int], width: int
) -> None:
    """FlashAttention's widths, one in no multiple, and one that only the other kernel takes."""
    draw = torch.Generator().manual_seed(0)
    borders = torch.tensor([0, 5, 6, 30], dtype=torch.int32, device=GPU)

    def states(number: int) -> Tensor:
        made = torch.randn(1, number, 30, width, generator=draw, dtype=torch.float64)
        return made.to(GPU, dtype).requires_grad_()

    query, key, value = states(heads[0]), states(heads[1]), states(heads[1])
    pack = Pack(query, key, value, borders, 24, 0.2, True, window)  # 24 is the longest
    found = attend(pack)
    if found is None:
        assert dtype == torch.float64 or window is not None
        return
    wide = [one.detach().double().requires_grad_() for one in (query, key, value)]
    wanted = _by_sequence(Pack(*wide, borders, 24, 0.2, True, window))
    upstream = torch.randn_like(wanted)
    bound = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    pairs = [(found, wanted)]
    grads = torch.autograd.grad(found, (query, key, value), upstream.to(dtype))
    pairs += zip(grads, torch.autograd.grad(wanted, wide, upstream), strict=True)
    for one, other in pairs:
        assert float((one.double() - other).norm() / other.norm()) < bound


def test_dropout_has_the_same_bits_as_on_a_cpu() -> None:
    micro, layer = collate_examples(ragged(9)), ExampleDropout(0.3, 4)
    ones = torch.ones(*micro["input_ids"].shape, 257)
    key_dropout(layer, micro, seed=3, step=11)
    on_cpu = layer(ones)
    key_dropout(layer, to_device(micro, GPU), seed=3, step=11)
    assert torch.equal(layer(ones.to(GPU)).cpu(), on_cpu)


@pytest.mark.slow
def test_compiled_dropout_has_the_same_bits_too() -> None:
    micro, layer = to_device(collate_examples(ragged(9)), GPU), ExampleDropout(0.3, 4)
    key_dropout(layer, micro, seed=3, step=11)
    ones = torch.ones(*micro["input_ids"].shape, 257)
    on_gpu = layer(ones.to(GPU)).cpu()
    compiled = torch.compile(layer, dynamic=True)
    assert torch.equal(compiled(ones.to(GPU)).cpu(), on_gpu)


def test_offloaded_activations_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies waiting for each other at every tensor, and memory used again at once."""
    monkeypatch.setattr(activations, "_MIN_OFFLOAD_BYTES", 0)
    monkeypatch.setattr(activations, "_BYTES_ON_THEIR_WAY", 2**14)
    activations._copy_stream.cache_clear()
    model = build("llama").to(GPU)
    micros = [to_device(one, GPU) for one in cut(model, ragged(24), [6], "none")]

    def offloaded(model: Any, micro: Any) -> Any:
        with activations.ActivationOffload(model):
            return samestep.CausalLMLoss()(model, micro)

    found = []
    for loss in (samestep.CausalLMLoss(), offloaded):
        samestep.backward(model, micros, loss)
        found.append(gradients(model))
    activations._copy_stream.cache_clear()
    assert worst(*found) < 1e-12


def test_micro_batches_are_pinned() -> None:
    micro = pinned(collate_examples(ragged(3)), GPU)
    assert micro["input_ids"].is_pinned()
    assert not micro["example_ids"].is_pinned()


@pytest.mark.parametrize("loss", [samestep.CausalLMLoss(), DFT()], ids=["nll", "dft"])
def test_nothing_waits_between_counting_and_the_last_micro_batch(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", torch.bfloat16).to(GPU)
    replace_dropout(model)
    parts = cut(model, ragged(24), [6], "none")
    micros: list[Any] = [to_device(pinned(one, GPU), GPU) for one in parts]
    keyed = with_keyed_dropout(loss, seed=0, step=0)
    samestep.backward(model, micros, keyed)  # looks at the head, once for good
    monkeypatch.setattr(TermAccumulator, "totals", lambda self: {})  # read after the last one
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, counts, _, _ = count_batch(micros, None)
        accumulate(
            *(model, prepare_for_step(model)),
            micro_batches=micros,
            loss_fn=keyed,
            counts=counts,
            normalize="token",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiling", ["none", pytest.param("layers", marks=pytest.mark.slow)])
def test_a_run_learns_what_it_learns_on_a_cpu(tmp_path: Path, compiling: str) -> None:
    """Mixed precision, packs of FlashAttention, micro-batches made ahead."""
    tiny = llama_folder(tmp_path / "tiny")
    changes = {"model": str(tiny), "micro_batch": 3, "steps": 4}
    there = run_config(tmp_path, device="cuda", compile=compiling, **changes)
    train(there)
    train(run_config(tmp_path, device="cpu", out=str(tmp_path / "cpu"), **changes))
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "cpu")
    )
    assert max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other) < 0.05
    assert not [each for each in threading.enumerate() if each.name.startswith("samestep-ahead")]


@pytest.mark.slow
def test_layers_are_compiled_whole(tmp_path: Path) -> None:
    assert varlen.flash_function() is not None
    setup = set_up(run_config(tmp_path, device="cuda", compile="layers", micro_batch=4))
    assert len(compiled_layers(setup.model)) == 1  # of two: the last is cut to the targets
    micros = list(setup.micro_batches.batches(range(16), 0))
    samestep.backward(setup.model, micros, setup.objective.loss_fn)
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"device": "cuda", "deterministic": True, "micro_batch": 3, "save_every": 1}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), **changes))
    step, done = trainer.step, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tmp_path, **changes))
    monkeypatch.undo()
    train(run_config(tmp_path, resume=True, **changes))
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_process_that_has_multiplied_before_is_told_what_cublas_needs() -> None:
    code = (
        "import torch; from samestep.engine.repeatable import repeatable_operations\n"
        "one = torch.ones(2, 2, device='cuda'); one @ one\n"
        "with repeatable_operations('deterministic'): print('inside')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    results = []
    for setting in ({}, {SETTING: VALUE}):
        environment.pop(SETTING, None)
        command = [sys.executable, "-c", code]
        results.append(
            subprocess.run(
                command, env=environment | setting, capture_output=True, text=True, check=False
            )
        )
    refused, taken = results
    assert "ConfigError: deterministic: cuBLAS does not repeat" in refused.stderr
    assert "inside" not in refused.stdout
    assert taken.stdout == "inside\n"
