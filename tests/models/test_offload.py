"""Which tensors are offloaded, where they come back to, and copies beside the computation.

There is no GPU here: what its streams are told is recorded, in order, and copies happen at once.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import build, cut, gradients, ragged
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import samestep
from samestep.models import activations
from samestep.models.activations import ActivationOffload
from samestep.models.copy_stream import CopyStream

GPU = torch.device("cuda:1")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is moved; nothing is too small to be."""
    found: list[tuple[int, ...]] = []

    class Noted(activations._Offloaded):
        def __init__(self, tensor: Tensor, *, number: int) -> None:
            found.append(tuple(tensor.shape))
            super().__init__(tensor, number=number)

    monkeypatch.setattr(activations, "_Offloaded", Noted)
    monkeypatch.setattr(activations, "_MIN_OFFLOAD_BYTES", 0)
    return found


def offloaded(model: Any, micro: Any) -> Any:
    with ActivationOffload(model):
        return samestep.CausalLMLoss()(model, micro)


def test_under_autocast_no_copy_of_a_weight_is_moved(moved: list[tuple[int, ...]]) -> None:
    model = build("llama-tied", torch.float32)
    micros = cut(model, ragged(12), [5], "none")
    sizes = {tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2}
    sizes |= {shape[::-1] for shape in sizes}
    found = []
    for loss in (samestep.CausalLMLoss(), offloaded):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):  # copies live for the step

            def mixed(model: Any, micro: Any, loss: Any = loss) -> Any:
                with torch.autocast("cpu", torch.bfloat16):
                    return loss(model, micro)

            samestep.backward(model, micros, mixed)
        found.append(gradients(model))
    plain, other = found
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert moved
    assert not sizes & {*moved}


class Scaled(nn.Module):
    """A weight, views and casts of it, and what is none of them though it has its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)


def test_what_is_made_of_a_weight_alone_is_kept(moved: list[tuple[int, ...]]) -> None:
    model = Scaled()
    states = torch.randn(8, 8, requires_grad=True)
    own = model.weight
    offload = ActivationOffload(model)
    for kept in (own, own.t(), own.bfloat16(), own.bfloat16().t(), own.view(64), model.frozen.t()):
        assert offload.unpack_hook(offload.pack_hook(kept)).data_ptr() == kept.data_ptr()
    assert not moved
    table = nn.Embedding.from_pretrained(own, freeze=False)
    others = (states, states.bfloat16(), own @ states, own * states, table(torch.arange(3)))
    for other in others:
        packed: Any = offload.pack_hook(other)
        assert torch.equal(offload.unpack_hook(packed), other)
    assert len(moved) == len(others)


def test_a_tensor_comes_back_to_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to that of the weights, which under cpu_offload are elsewhere."""
    monkeypatch.setattr(activations, "_copy_stream", lambda device: None)
    offload = ActivationOffload(nn.Linear(2, 2))
    with FakeTensorMode():
        packed: Any = offload.pack_hook(torch.empty(300, 300, device=GPU))
        assert packed._copy.device.type == "cpu"
        assert offload.unpack_hook(packed).device == GPU


class Recorder:
    """`torch.cuda`, as far as it is used: what its streams were told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.main = Stream(self, "computation")
        self.current: Any = self.main

    def Stream(self, device: torch.device) -> "Stream":  # noqa: N802
        return Stream(self, "copies")

    def current_stream(self, device: torch.device) -> Any:
        return self.main

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.main


class Stream:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name, self.events = recorder, name, 0

    def wait_stream(self, other: "Stream") -> None:
        self.recorder.told.append((self.name, f"waits for {other.name}"))

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events}"

    def wait_event(self, event: str) -> None:
        self.recorder.told.append((self.name, f"waits for {event}"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Copies from CPU to CPU take the way of a GPU's."""
    recorder = Recorder()
    copy = Tensor.copy_

    def noted(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            recorder.told.append((recorder.current.name, "copies"))
        return copy(self, source)

    def kept(self: Tensor, stream: Any) -> None:
        pytest.fail("the memory would be kept until the GPU is there, however far the CPU is ahead")

    monkeypatch.setattr(Tensor, "copy_", noted)
    monkeypatch.setattr(Tensor, "record_stream", kept)
    return recorder


def stream_of(recorder: Recorder, *, held: int) -> CopyStream:
    """On the CPU, whose memory cannot be pinned here."""
    return CopyStream(torch.device("cpu"), held=held, cuda=recorder, pin=False)


@pytest.mark.parametrize(
    "tensor",
    [torch.rand(2, 3, 4), torch.rand(2, 3, 4).transpose(0, 2), torch.rand(1, 3).expand(2, 3)],
    ids=["in a row", "transposed", "expanded"],
)
def test_what_comes_back_is_laid_out_as_it_was(recorder: Recorder, tensor: Tensor) -> None:
    """Else the backward took other kernels, which round otherwise; what overlaps is spread out."""
    stream = stream_of(recorder, held=0)
    back = stream.receive(stream.fetch(stream.send(tensor)))
    assert torch.equal(back, tensor)
    overlaps = 0 in tensor.stride()
    assert back.stride() == (tensor.contiguous() if overlaps else tensor).stride()


def test_a_tensor_is_held_until_the_computation_waits_for_its_copy(recorder: Recorder) -> None:
    stream = stream_of(recorder, held=40)
    tensors = [torch.full((10,), float(at)) for at in range(3)]  # of 40 bytes
    alive = [weakref.ref(tensor) for tensor in tensors]
    copies = []
    for at in range(3):
        copies.append(stream.send(tensors[at]))
        tensors[at] = torch.empty(0)
        assert [one() is None for one in alive] == [one < at for one in range(3)]
    stream.finish_sending()
    assert all(one() is None for one in alive)
    assert [float(copy[0]) for copy in copies] == [0, 1, 2]
    sent = [("copies", "waits for computation"), ("copies", "copies")]
    waits = [[("computation", f"waits for event {at}")] for at in (1, 2, 3)]
    assert recorder.told == [*sent, *sent, *waits[0], *sent, *waits[1], *waits[2]]


def test_what_comes_back_is_waited_for_where_it_is_received(recorder: Recorder) -> None:
    stream = stream_of(recorder, held=0)
    copy = stream.send(torch.arange(5.0))
    recorder.told.clear()
    fetched = stream.fetch(copy)
    sent = [("copies", "waits for computation"), ("copies", "copies")]
    assert recorder.told == sent
    assert torch.equal(stream.receive(fetched), torch.arange(5.0))
    assert recorder.told == [*sent, ("computation", "waits for event 2")]
    del fetched
    assert len(recorder.told) == 3  # nothing more to wait for


def test_memory_of_what_is_dropped_on_its_way_is_used_again_after_the_copy(
    recorder: Recorder,
) -> None:
    stream = stream_of(recorder, held=0)
    fetched = stream.fetch(stream.send(torch.arange(5.0)))
    recorder.told.clear()
    tensor = weakref.ref(fetched.tensor)
    del fetched
    assert recorder.told == [("computation", "waits for event 2")]
    assert tensor() is None


def test_the_backward_is_given_what_it_asks_for_next_while_it_computes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, moved: list[tuple[int, ...]]
) -> None:
    model, examples = build("llama"), ragged(6)
    (micro,) = cut(model, examples, [6], "none")
    samestep.backward(model, [micro], samestep.CausalLMLoss())
    wanted = gradients(model)
    ahead = 60_000
    stream = stream_of(recorder, held=ahead)
    monkeypatch.setattr(activations, "_BYTES_ON_THEIR_WAY", ahead)
    monkeypatch.setattr(activations, "_copy_stream", lambda device: stream)
    under_way, sums = [], []
    fetch, receive = stream.fetch, stream.receive

    def noted(copy: Tensor) -> Any:
        under_way.append(copy.nbytes)
        return fetch(copy)

    def taken(arrived: Any) -> Tensor:
        sums.append(sum(under_way) - arrived.tensor.nbytes)
        under_way.remove(arrived.tensor.nbytes)
        return receive(arrived)

    monkeypatch.setattr(stream, "fetch", noted)
    monkeypatch.setattr(stream, "receive", taken)
    samestep.backward(model, [micro], offloaded)
    assert all(torch.equal(found, wanted[name]) for name, found in gradients(model).items())
    assert not stream._leaving
    copies = [what for what, said in recorder.told if said == "copies"]
    assert 20 < 2 * len(moved) - 1 <= len(copies) <= 2 * len(moved)  # one is never asked for
    largest = max(torch.Size(shape).numel() * 8 for shape in moved)
    assert sorted(sums)[len(sums) // 2] > ahead / 2  # others are under way as one is received
    assert max(sums) < ahead + 5 * largest  # an operation has at most five
