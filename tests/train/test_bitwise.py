"""Runs under --bitwise: on other ranks, killed and resumed, and verified by their log."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from bit_objectives import lines_of
from gloo import on_ranks
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file

from samestep import cli
from samestep.errors import ConfigError, OutOfMemoryError
from samestep.train import bitwise, verify_command
from samestep.train.trainer import train

SETTINGS: dict[str, Any] = {
    "bitwise": True,
    "micro_tokens": 64,
    "steps": 4,
    "save_every": 2,
    "eval_every": 2,
    "threads": 1,
    "keep": 9,
    "device": "cpu",
}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "eval_data": str(folder / "eval.jsonl"), **changes}


def tensors(out: Path) -> dict[str, bytes]:
    found = load_file(next((out / "model").glob("*.safetensors")))
    return {name: value.numpy().tobytes() for name, value in found.items()}


def bits(out: Path) -> Any:
    """All that a run leaves: the digests of each step and state, the model, losses of both logs."""
    lines = {(line["step"], *sorted(line)): line for line in read_lines(out / "digests.jsonl")}
    numbers = [
        [(line["step"], line["loss"], line["terms"], line["counts"]) for line in read_lines(log)]
        for log in (out / "log.jsonl", out / "eval.jsonl")
    ]
    return lines, numbers, tensors(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a run of one process in ``alone``."""
    folder = tmp_path_factory.mktemp("bits")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 17)
    write_rows(folder / "eval.jsonl", 9, seed=1)
    train(run_config(folder, **settings(folder, out=str(folder / "alone"))))
    return folder


def test_two_real_ranks_have_the_bits_of_one(folder: Path) -> None:
    out = folder / "two"
    on_ranks(2, rank_work.training, str(folder), **settings(folder, out=str(out)))
    assert bits(out) == bits(folder / "alone")


def cut_back(out: Path, step: int) -> None:
    """What a run that was killed after a checkpoint leaves: later lines and a torn one."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "model")
    with (out / "digests.jsonl").open("a") as file:
        file.write('{"step": 3, "dig')


def test_killed_on_two_ranks_and_resumed_on_one(folder: Path) -> None:
    out = folder / "resumed"
    on_ranks(2, rank_work.training, str(folder), **settings(folder, out=str(out)))
    cut_back(out, 2)
    train(run_config(folder, **settings(folder, out=str(out), resume=True)))
    assert bits(out) == bits(folder / "alone")


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": 2, "lora_dropout": 0.2, "optimizer": "sgd", "lr": 0.1},
        {"precision": "mixed", "micro_tokens": "auto"},
        {"micro_batch": 3, "micro_tokens": "auto", "gradient_checkpointing": "full"},
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    folder: Path, tmp_path: Path, options: Any
) -> None:
    options = settings(folder, **options, steps=2, save_every=1, eval_every=None, eval_data=None)
    outs = [tmp_path / "whole", tmp_path / "broken"]
    for out in outs:
        train(run_config(folder, **options, out=str(out)))
    cut_back(outs[1], 1)
    train(run_config(folder, **options, out=str(outs[1]), resume=True))
    whole, broken = ((read_lines(out / "digests.jsonl"), tensors(out)) for out in outs)
    assert whole == broken


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", ["causal_lm mixtral", "kto", "embedding"])
def test_objectives_that_couple_the_batch_have_the_same_bits(tmp_path: Path, case: str) -> None:
    """A sum over the routers of the batch, the KL of all rows, negatives from all rows."""
    found = [lines_of(tmp_path, case, backwards=backwards, steps=1) for backwards in (False, True)]
    assert found[0] == found[1]


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["verify", *arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_verify_says_equal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(folder / "alone")
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    code, said = verify(capsys, out)
    assert (code, "steps 3 to 4 of" in said, "equal to the bit" in said) == (0, True, True)
    assert "from checkpoint step-00000002" in said
    code, said = verify(capsys, out, "--steps", "1..2")
    assert (code, "steps 1 to 2 of" in said, "from the beginning" in said) == (0, True, True)
    assert before == {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def changed(folder: Path, change: Any) -> str:
    """A copy of the run whose digests are changed."""
    out = folder / "changed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "alone", out)
    lines = read_lines(out / "digests.jsonl")
    for line in lines:
        change(line)
    (out / "digests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(out)


def test_verify_names_the_first_step_and_weight_that_differ(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_sums(line: dict[str, Any]) -> None:
        if line["step"] >= 2 and "sums" in line:
            line["digest"] = "0" * 64
            line["sums"]["model.norm.weight"] = "0" * 16
            line["sums"]["lm_head.weight"] = "0" * 16

    code, said = verify(capsys, changed(folder, other_sums), "--steps", "1..4")
    assert code == 1
    assert re.search(r"step 2 of .* first in the gradient of model\.norm\.weight", said)

    def other_state(line: dict[str, Any]) -> None:
        if line["step"] == 4 and "weights" in line:
            line["state"] = "0" * 64
            line["weights"]["lm_head.weight (exp_avg)"] = "0" * 16

    code, said = verify(capsys, changed(folder, other_state))
    assert code == 1
    assert "step 4" in said
    assert "the value of lm_head.weight (exp_avg)" in said


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("processor", "Other; CPU", "processor: was Other; CPU, is "),
        ("torch", "1.0", "torch: was 1.0, is "),
        ("threads", "3", "threads: was 3, is 1"),
    ],
)
def test_verify_names_what_it_cannot_run_on(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, value: str, named: str
) -> None:
    def elsewhere(line: dict[str, Any]) -> None:
        if "start" in line:
            line["start"]["environment"][name] = value

    code, said = verify(capsys, changed(folder, elsewhere))
    assert (code, named in said) == (2, True)


def test_a_log_of_another_way_of_summing_is_refused_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a version before, whose logs do not say how they were summed."""

    def of_before(line: dict[str, Any]) -> None:
        if "start" in line:
            del line["start"]["environment"]["way of summing and digesting"]

    code, said = verify(capsys, changed(folder, of_before))
    assert (code, "way of summing and digesting: was not there" in said) == (2, True)


def test_several_ranks_verify_what_one_rank_ran(folder: Path) -> None:
    verdicts = on_ranks(2, rank_work.verifying, str(folder / "alone"))
    assert verdicts == [(0, "", 3, 4)] * 2
    out = changed(folder, lambda line: line.update(digest="0" * 64) if "digest" in line else None)
    verdicts = on_ranks(2, rank_work.verifying, out)
    assert verdicts == [(1, "the gradient of all weights", 3, 3)] * 2


def test_verify_starts_the_ranks_that_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank gets the command as it stands; the exit code is that of the ranks."""
    started: list[Any] = []
    monkeypatch.setattr(
        verify_command, "launch", lambda *given: started.append(given) or len(started) - 1
    )
    arguments = ["verify", str(folder / "alone"), "--steps", "1..2", "--ranks", "2"]
    assert [cli.main(arguments) for _ in range(2)] == [0, 1]
    assert started == [(2, arguments)] * 2


def test_verify_says_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = verify(capsys, str(folder / "alone"), "--steps", "3..7")
    assert (code, "step 5 is not there" in said) == (2, True)
    code, said = verify(capsys, str(folder / "alone"), "--steps", "x")
    assert (code, "as in 5..9" in said) == (2, True)
    code, said = verify(capsys, str(folder / "nowhere"))
    assert (code, "there is no run in" in said) == (2, True)
    out = folder / "ordinary"
    train(run_config(folder, out=str(out), steps=1))
    code, said = verify(capsys, str(out))
    assert (code, "only runs with --bitwise" in said) == (2, True)


def test_what_defines_the_bits_is_kept_at_a_resume(folder: Path) -> None:
    out = folder / "defined"
    shutil.copytree(folder / "alone", out)
    with pytest.raises(ConfigError, match="micro_tokens: was 64, is 128"):
        train(run_config(folder, **settings(folder, micro_tokens=128, out=str(out), resume=True)))
    with pytest.raises(ConfigError, match="threads: was 1, is 2"):
        train(run_config(folder, **settings(folder, threads=2, out=str(out), resume=True)))
    unnamed = settings(folder, threads=None, out=str(out), resume=True)
    train(run_config(folder, **unnamed))  # as many as the run had
    assert "threads: 1" in (out / "config.yaml").read_text()


def test_a_run_goes_on_elsewhere_only_without_its_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "elsewhere"
    shutil.copytree(folder / "alone", out)
    monkeypatch.setattr(bitwise, "processor_name", lambda: "Other; CPU")
    again = settings(folder, out=str(out), resume=True)
    with pytest.raises(ConfigError, match=r"processor: was .*, is Other; CPU[\s\S]*--no-bitwise"):
        train(run_config(folder, **again))
    train(run_config(folder, **{**again, "bitwise": False}))


@pytest.mark.parametrize("fits", [80, 3])
def test_out_of_memory_names_the_budget_that_would_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    from samestep.objectives.language import CausalLMLoss

    run_loss = CausalLMLoss.__call__

    def small_memory(self: Any, model: Any, micro: Any) -> Any:
        if micro["input_ids"].numel() > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_loss(self, model, micro)

    monkeypatch.setattr(CausalLMLoss, "__call__", small_memory)
    wanted = "fits with --micro-tokens 64 .tried" if fits == 80 else "Not even one row alone fits"
    out = str(folder / f"memory-{fits}")
    with pytest.raises(OutOfMemoryError, match=f"packs are part of the run.*{wanted}"):
        train(run_config(folder, **settings(folder, eval_data=None, micro_tokens=256, out=out)))


def test_contradictions_are_said_before_a_run(tmp_path: Path) -> None:
    for changes, named in (
        ({"parallel": "fsdp2"}, "bitwise: not under parallel fsdp2"),
        ({"precision": "float64"}, "bitwise: sums keep fewer bits"),
    ):
        with pytest.raises(ConfigError, match=named):
            run_config(tmp_path, model="m", bitwise=True, **changes)


def test_ranks_that_part_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samestep.errors import StepError

    monkeypatch.setattr(bitwise, "all_gather_object", lambda digest: [digest, "other"])
    with pytest.raises(StepError, match=r"rank 1 has other summed gradients than rank 0 after"):
        train(run_config(folder, **settings(folder, out=str(folder / "parted"))))
