"""What a resumed run must find as it was, and what it says if it does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_rows import write_rows_of
from runs import llama_folder, run_config
from safetensors.torch import load_file, save_file

from samestep.errors import ConfigError
from samestep.train.origin import differences, origin_of
from samestep.train.trainer import train

LORA: dict[str, Any] = {"lora_rank": 2, "steps": 2, "save_every": 1}


def change_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.25
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"rms_norm_eps": 0.5}), encoding="utf-8")


def change_template(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write(" ")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weight, "model: model.safetensors: other content"),
        (change_config, r"model: config.json: rms_norm_eps: was 1e-06, is 0.5"),
        (change_template, "tokenizer: chat_template.jinja: other content"),
    ],
)
def test_what_changed_under_adapters_is_named(tmp_path: Path, change: Any, named: str) -> None:
    train(run_config(tmp_path, **LORA))
    change(tmp_path / "tiny")
    kept = (tmp_path / "out" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=named):
        train(run_config(tmp_path, **LORA, resume=True))
    assert (tmp_path / "out" / "config.yaml").read_bytes() == kept


DPO: dict[str, Any] = {"objective": "dpo", "steps": 2, "save_every": 1}


def test_a_reference_that_changed_is_named(tmp_path: Path) -> None:
    reference = str(llama_folder(tmp_path / "reference", seed=1))
    data = write_rows_of("dpo", tmp_path / "pairs.jsonl", 16)
    options = {**DPO, "data": data, "reference_model": reference}
    train(run_config(tmp_path, **options))
    change_weight(tmp_path / "reference")
    with pytest.raises(ConfigError, match=r"reference_model: model\.safetensors: other content"):
        train(run_config(tmp_path, **options, resume=True))


@pytest.mark.parametrize(
    ("options", "folder", "named"),
    [
        ({"objective": "dpo"}, "tiny", "model: model.safetensors: other content"),
        ({"objective": "dpo", "reference_model": "other"}, "tiny", ""),
        (
            {"objective": "distillation", "teacher": "other"},
            "other",
            "teacher: model.safetensors: other content",
        ),
        ({"objective": "distillation", "teacher": "other"}, "tiny", ""),
        ({"objective": "causal_lm"}, "tiny", ""),
    ],
)
def test_weights_count_where_a_run_reads_them_anew(
    tmp_path: Path, options: dict[str, str], folder: str, named: str
) -> None:
    """The start is its own reference, and is read again; what a checkpoint holds is not."""
    llama_folder(tmp_path / "other", seed=1)
    paths = {name: str(tmp_path / value) for name, value in options.items() if value == "other"}
    settings = run_config(tmp_path, **{**options, **paths})
    model = torch.nn.Linear(1, 1)
    before = origin_of(settings, model)
    change_weight(tmp_path / folder)
    assert differences(before, origin_of(settings, model)) == [named] * bool(named)


@pytest.mark.parametrize("setting", ["reference_model", "teacher"])
def test_how_a_reference_computes_counts_too(tmp_path: Path, setting: str) -> None:
    objective = "dpo" if setting == "reference_model" else "distillation"
    other = str(llama_folder(tmp_path / "other", seed=1))
    settings = run_config(tmp_path, **{"objective": objective, setting: other})
    before = origin_of(settings, torch.nn.Linear(1, 1))
    change_config(tmp_path / "other")
    changed = differences(before, origin_of(settings, torch.nn.Linear(1, 1)))
    assert changed == [f"{setting}: config.json: rms_norm_eps: was 1e-06, is 0.5"]


def test_weights_that_a_checkpoint_holds_may_change(tmp_path: Path) -> None:
    train(run_config(tmp_path, steps=1))
    change_weight(tmp_path / "tiny")
    train(run_config(tmp_path, steps=1, resume=True))


def test_checkpoints_of_earlier_versions_go_on_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from samestep.train import checkpoint_files

    train(run_config(tmp_path, **LORA))
    for path in checkpoint_files.all_checkpoints(tmp_path / "out" / "checkpoints"):
        state = checkpoint_files.read_state(path)
        del state["origin"]
        checkpoint_files.write_state(path, state)
    train(run_config(tmp_path, **LORA, resume=True))
    assert "whether the model's files have changed since is not known" in caplog.text


@pytest.mark.parametrize("content", [None, "lr: 7.0", "\x00"])
def test_the_checkpoints_copy_of_the_settings_decides(tmp_path: Path, content: str | None) -> None:
    train(run_config(tmp_path, steps=1))
    config = tmp_path / "out" / "config.yaml"
    config.unlink() if content is None else config.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lr: was .*, is 0.5"):
        train(run_config(tmp_path, steps=1, resume=True, lr=0.5))
    train(run_config(tmp_path, steps=1, resume=True))
    assert "steps: 1" in config.read_text(encoding="utf-8")
