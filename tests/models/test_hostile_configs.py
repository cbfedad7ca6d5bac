"""Models whose config.json or weights are not what they should be: named, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder, run_config
from safetensors.torch import load_file, save_file

from samestep.errors import ConfigError, SamestepError
from samestep.models import probes
from samestep.models.load import load_model
from samestep.train.setup import set_up

NEVER: list[Any] = [None, -1, 0, 10**12, 10**400, 1.5, "x", [], {}, [1], True, float("nan")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    llama_folder(folder / "tiny")
    run_config(folder)
    return folder


@pytest.mark.parametrize(
    "field",
    [
        *("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "model_type"),
        *("max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act", "dtype"),
        *("pad_token_id", "tie_word_embeddings", "attention_dropout", "architectures"),
    ],
)
def test_any_value_in_a_config_is_taken_or_refused(folder: Path, field: str) -> None:
    file = folder / "tiny" / "config.json"
    whole = file.read_text(encoding="utf-8")
    try:
        for value in NEVER:
            file.write_text(json.dumps({**json.loads(whole), field: value}), encoding="utf-8")
            try:
                load_model(str(folder / "tiny"))
            except ConfigError as error:
                assert str(folder / "tiny") in str(error), value
    finally:
        file.write_text(whole, encoding="utf-8")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", "{}", "\xff"])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    file = folder / "tiny" / "config.json"
    whole = file.read_text(encoding="utf-8")
    try:
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match="could not be loaded"):
            load_model(str(folder / "tiny"))
    finally:
        file.write_text(whole, encoding="utf-8")


def test_what_trips_a_library_after_loading_is_said_of_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from samestep.train import setup

    def trip(*_: object) -> None:
        raise TypeError("'>' not supported between instances of 'int' and 'str'")

    monkeypatch.setattr(setup, "replace_dropout", trip)
    with pytest.raises(ConfigError, match=r"tiny cannot be used \(TypeError: .*config.json"):
        set_up(run_config(folder))


def with_weights(folder: Path, target: Path, change: Any) -> str:
    """A copy of a model with other weights."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_nan_in_an_embedding_that_no_row_uses_is_named(folder: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][-1, 0] = torch.nan

    model = with_weights(folder / "tiny", tmp_path / "nan", spoil)
    with pytest.raises(ConfigError, match=r"not finite: model.embed_tokens.weight has 1 of"):
        set_up(run_config(folder, model=model))


@pytest.mark.parametrize(("value", "named"), [(0.0, "all 0"), (torch.nan, "not finite")])
def test_outputs_that_tell_nothing_are_named(folder: Path, value: float, named: str) -> None:
    """Of them it would only be said that sequences see each other."""
    model = load_model(str(folder / "tiny"))
    answers = [torch.full((3, 7), value), torch.full((5, 7), value)]
    with pytest.raises(ConfigError, match=f"the outputs of LlamaForCausalLM are {named}"):
        probes._check_answers(model, lambda: answers)
    probes._check_answers(model, lambda: [torch.arange(3.0)])


@pytest.mark.parametrize("field", ["seed", "steps", "batch_size", "micro_batch", "max_length"])
def test_numbers_beyond_any_use_are_refused_by_their_setting(folder: Path, field: str) -> None:
    with pytest.raises(SamestepError, match=rf"{field}: {2**64} is too large"):
        run_config(folder, **{field: 2**64})
