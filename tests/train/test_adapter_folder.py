"""A folder of adapters as the model of a run: they train on, or are folded in first."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from cases import worst
from gloo import on_ranks
from objective_rows import write_rows_of
from peft import PeftModel
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.cli import main
from samestep.errors import ConfigError
from samestep.models.load import resolve_source
from samestep.models.placement import made_on
from samestep.models.weightless import without_weights
from samestep.train.after import load_finished
from samestep.train.command import check_paths
from samestep.train.trainer import train

STEPS: dict[str, Any] = {
    "precision": "float64",
    "optimizer": "sgd",
    "schedule": "constant",
    "warmup": 0,
    "weight_decay": 0.0,
    "lr": 0.5,
    "micro_batch": 3,
    "batch_size": 8,  # all rows: then which step it is does not matter
}
ADAPTERS: dict[str, Any] = {
    "lora_rank": 2,
    "lora_targets": ("q_proj", "down_proj"),
    "use_dora": True,
    "trainable_token_indices": (5, 6),
    "modules_to_save": ("norm",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, a run of two steps whose model is an adapter, and two more with it."""
    folder = tmp_path_factory.mktemp("adapters")
    llama_folder(folder / "tiny")
    double = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float64)
    double.save_pretrained(folder / "tiny")
    write_rows(folder / "rows.jsonl", 8)
    write_rows(folder / "other.jsonl", 4, seed=1)
    run(folder, "two", steps=2, **ADAPTERS)
    evaluated = {"eval_data": str(folder / "other.jsonl"), "save_every": 1, "keep": 9}
    run(folder, "more", **on(folder, steps=2, micro_batch=1, padding="left", **evaluated))
    return folder


def run(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    return train(run_config(folder, out=str(folder / out), **{**STEPS, **changes}))


def on(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that begins with the adapter."""
    return {"model": str(folder / "two" / "model"), **changes}


def adapter(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "adapter_model.safetensors")


def test_two_steps_and_two_more_are_four(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under every split, on two ranks, and resumed; then asked, evaluated and exported."""
    run(folder, "four", steps=4, **ADAPTERS)
    caplog.set_level(logging.INFO, "samestep")
    assert worst(adapter(folder / "more"), adapter(folder / "four")) < 1e-12
    assert worst(adapter(folder / "two"), adapter(folder / "four")) > 1e-3
    ranks = {**STEPS, **on(folder, steps=2, out=str(folder / "ranks"))}
    on_ranks(2, rank_work.training, str(folder), **ranks)
    assert worst(adapter(folder / "ranks"), adapter(folder / "four")) < 1e-12
    whole = adapter(folder / "more")
    shutil.rmtree(folder / "more" / "checkpoints" / "step-00000002")
    assert main(["train", "--resume", "--out", str(folder / "more")]) == 0
    assert f"the adapter in {folder / 'two' / 'model'} trains on" in caplog.text
    assert all(torch.equal(value, whole[name]) for name, value in adapter(folder / "more").items())
    capsys.readouterr()
    assert main(["eval", str(folder / "more"), "--data", str(folder / "other.jsonl")]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    last = read_lines(folder / "more" / "eval.jsonl")[-1]
    assert float(said["loss"]) == pytest.approx(last["loss"], rel=1e-5)
    assert main(["generate", str(folder / "more"), "--prompt", "a", "--tokens", "2"]) == 0
    arguments = ["export", str(folder / "more"), "--out", str(folder / "exported"), "--merge"]
    assert main(arguments) == 0
    merged = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype="auto")
    assert_same_outputs(merged, load_finished(str(folder / "more"))[0])


def assert_same_outputs(one: Any, other: Any) -> None:
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        found, wanted = one.eval()(ids).logits, other.eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_merged_first_a_new_adapter_begins_where_the_old_one_ended(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    new = {"model_adapter": "merge", "lora_rank": 1, "merge": True}
    run(folder, "stacked", **on(folder, steps=1, **new))
    assert "is folded into its base; a new adapter trains" in caplog.text
    first, other = (read_lines(folder / out / "log.jsonl")[0] for out in ("stacked", "more"))
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-6)  # the fold is in float32
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(base, str(folder / "two" / "model")).merge_and_unload()
    run(folder, "all", **on(folder, steps=1, model_adapter="merge", lr=1e-30))
    assert "is folded into its base; all weights train" in caplog.text
    found = load_file(folder / "all" / "model" / "model.safetensors")
    wanted = dict(by_peft.named_parameters())
    # Its weights are loaded as they were folded: float32.
    assert worst({n: w.float() for n, w in found.items()}, {n: wanted[n] for n in found}) < 1e-6
    text = AutoTokenizer.from_pretrained(folder / "all" / "model").decode([9, 10])
    assert text == AutoTokenizer.from_pretrained(folder / "tiny").decode([9, 10])


@pytest.mark.parametrize(
    "around", [lambda: made_on(torch.device("meta")), without_weights], ids=["elsewhere", "nowhere"]
)
def test_folded_weights_do_not_depend_on_where_the_run_wants_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, around: Any
) -> None:
    """They are kept for all runs; the meta device stands for another one than the CPU."""
    adapter = str(folder / "two" / "model")
    wanted = load_file(Path(resolve_source(adapter)) / "model.safetensors")
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path))
    with around():
        made = Path(resolve_source(adapter))
    assert tmp_path in made.parents
    found = load_file(made / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_the_reference_is_the_model_with_the_adapter_that_it_began_with(folder: Path) -> None:
    rows = write_rows_of("dpo", folder / "pairs.jsonl", 8, seed=0)
    for out, changes in (("dpo", on(folder)), ("dpo base", {"lora_rank": 2})):
        run(folder, out, objective="dpo", data=str(rows), steps=1, **changes)
        first = read_lines(folder / out / "log.jsonl")[0]
        assert first["terms"]["sigmoid"] == pytest.approx(math.log(2), rel=1e-6)


def copied(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """The adapter, with other fields in its adapter_config.json."""
    there = tmp_path / "adapter"
    shutil.copytree(folder / "two" / "model", there)
    path = there / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    return there


def test_what_contradicts_the_adapter_is_said_at_once(folder: Path) -> None:
    wrong = {"lora_rank": 8, "lora_alpha": 1.0, "use_dora": False, "init": "random"}
    with pytest.raises(ConfigError) as found:
        run_config(folder, **on(folder, **wrong, lora_targets="all-linear"))
    for part in (
        "lora_rank: 8, but the adapter in",
        "has 2: leave it out",
        "lora_alpha: 1.0, but",
        "use_dora: False, but",
        "lora_targets: all-linear, but",
        "has down_proj, q_proj",
        "init: random",
    ):
        assert part in str(found.value)
    with pytest.raises(ConfigError, match=r"model_adapter: .*tiny is no folder of adapters"):
        run_config(folder, model_adapter="merge")
    same = run_config(folder, **on(folder, **ADAPTERS, lora_dropout=0.1))
    assert (same.lora_alpha, same.lora_dropout) == (4.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base: set base_model_name_or_path"),
        ({"peft_type": "IA3"}, "of peft_type IA3: only LORA"),
        ({"r": 3}, "does not fit its base"),
        ({"target_modules": ["q_proj"]}, "has no place in the base"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "up_proj.lora_A.weight is miss"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_used_is_said(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    there = copied(folder, tmp_path, **changes)
    with pytest.raises(ConfigError) as found:
        run(folder, "x", model=str(there), steps=1)
    assert message in str(found.value)
    assert str(there) in str(found.value)
    assert not (folder / "x").exists()


def test_what_is_missing_or_damaged_is_said(folder: Path, tmp_path: Path) -> None:
    there = copied(folder, tmp_path, base_model_name_or_path=str(tmp_path / "gone"))
    settings = run_config(folder, model=str(there), out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"model: the base of .*there is no folder .*gone"):
        check_paths(settings)
    with pytest.raises(ConfigError, match=r"was trained on .*gone, which cannot be loaded"):
        train(settings)
    weights = load_file(there / "adapter_model.safetensors")
    shutil.copy(folder / "two" / "model" / "adapter_config.json", there)
    broken = {name: torch.full_like(value, math.nan) for name, value in weights.items()}
    save_file(broken, there / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="is not finite"):
        train(settings)
    (there / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        train(settings)
    (there / "adapter_model.safetensors").rename(there / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"pickled weights are not read"):
        run_config(folder, model=str(there))
    (there / "adapter_config.json").write_text("[", "utf-8")
    with pytest.raises(ConfigError, match=r"adapter_config.json cannot be read"):
        run_config(folder, model=str(there))


def test_another_base_is_noticed_by_a_resumed_run(folder: Path, tmp_path: Path) -> None:
    aside = tmp_path / "aside.safetensors"
    weights = folder / "tiny" / "model.safetensors"
    shutil.copy(weights, aside)
    try:
        changed = load_file(weights)
        changed["lm_head.weight"] += 1
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"model: model.safetensors: other content"):
            main(["--debug", "train", "--resume", "--out", str(folder / "more")])
    finally:
        shutil.copy(aside, weights)
