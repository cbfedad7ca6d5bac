"""The same bits on a GPU: one rank, alone and in a group of NCCL; skipped without one."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bit_runs
import pytest
import torch
from bit_runs import coupled, plain_loss
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from torch import distributed as dist

import samestep
from samestep import cli
from samestep.engine import fold
from samestep.engine.grid_sum import GridSum
from samestep.train.launch import process_group
from samestep.train.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("default"),
]

GPU = "cuda:0"


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank of a group, as torchrun starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in (group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with process_group():
        assert "nccl" in str(dist.get_backend_config())
        yield


def steps(order: list[int], loss_fn: Any) -> Any:
    """Three steps with a restart before each: weights and digests."""
    torch.manual_seed(0)
    model, bitwise = bit_runs.TwoLayers().to(GPU), samestep.Bitwise()
    optimizer, digests = bit_runs.optimizer_of(model), []
    for number in range(3):
        packs = [
            {name: value.to(GPU) for name, value in pack.items()}
            for pack in (bit_runs.packs(number)[at] for at in order)
        ]
        samestep.step(model, optimizer, packs, loss_fn, check_sums=False, bitwise=bitwise)
        digests.append(bitwise.digests)
        state, bitwise = bitwise.state_dict(), samestep.Bitwise()
        bitwise.load_state_dict(state)
    return [weight.detach().cpu().float().tolist() for weight in model.parameters()], digests


@pytest.mark.parametrize("loss_fn", [plain_loss, coupled], ids=["sums", "coupled"])
def test_the_order_of_packs_changes_no_bit(loss_fn: Any) -> None:
    alone = steps([0, 1, 2, 3], loss_fn)
    assert steps([2, 0, 3, 1], loss_fn) == alone


def test_a_group_of_nccl_changes_no_bit(nccl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the all-reduces of integers and of maxima that a rank among several runs."""
    alone = steps([0, 1, 2, 3], plain_loss)
    sent: list[torch.dtype] = []
    real = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.dtype)
        return real(tensor, *arguments, **options)

    monkeypatch.setattr(dist, "all_reduce", counted)
    monkeypatch.setattr("samestep.engine.grid_sum.world_size", lambda: 2)
    monkeypatch.setattr("samestep.engine.bitwise.world_size", lambda: 2)
    assert steps([3, 2, 1, 0], plain_loss) == alone
    assert {torch.int64, torch.float64} <= set(sent)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sums_and_digests_are_those_of_a_cpu(number: int) -> None:
    """Pieces are cut otherwise there, and rows of the digest are added up at once."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(300 * fold.LANES + 7, generator=draw) for _ in range(number)]
    found = []
    for device in ("cpu", GPU):
        total = GridSum(40)
        for part in parts:
            total.add(part.clone().to(device))
        largest = float(total.largest())
        found.append((largest, *(each.cpu().numpy().tobytes() for each in total.finish())))
    assert found[0] == found[1]


def test_a_run_is_resumed_and_verified(
    tmp_path: Path, nccl: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixed precision and FlashAttention's backward, whose deterministic form is taken."""
    llama_folder(tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl", 17)
    options = {"bitwise": True, "micro_tokens": 64, "steps": 4, "save_every": 2, "keep": 9}
    options |= {"device": "cuda", "threads": 1}
    outs = [tmp_path / "whole", tmp_path / "broken"]
    for out in outs:
        train(run_config(tmp_path, out=str(out), **options))
    shutil.rmtree(outs[1] / "checkpoints" / "step-00000004")
    shutil.rmtree(outs[1] / "model")
    train(run_config(tmp_path, out=str(outs[1]), resume=True, **options))
    logs = [read_lines(out / "digests.jsonl") for out in outs]
    assert logs[0] == logs[1]
    models = [load_file(out / "model" / "model.safetensors") for out in outs]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    capsys.readouterr()
    assert cli.main(["verify", str(outs[1]), "--steps", "1..4"]) == 0
    assert "steps 1 to 4 of" in capsys.readouterr().out
