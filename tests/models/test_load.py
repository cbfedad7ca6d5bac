from pathlib import Path

import pytest
import torch
from runs import gpt2_folder, llama_folder
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, modeling_gguf_pytorch_utils

from samestep.errors import ConfigError
from samestep.models import gguf
from samestep.models.load import load_model, load_tokenizer, resolve_source


def test_a_folder_loads_in_train_mode(tmp_path: Path) -> None:
    folder = str(llama_folder(tmp_path / "m"))
    model = load_model(resolve_source(folder), dtype=torch.float64)
    assert model.training
    assert model.dtype == torch.float64
    assert load_tokenizer(folder).eos_token == "<|im_end|>"


def test_random_weights_need_the_config_alone_and_follow_the_seed(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    one, same, other = (load_model(str(folder), init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_attention_dropout_is_off_and_the_other_kinds_stay(tmp_path: Path) -> None:
    model = load_model(str(gpt2_folder(tmp_path / "m")))
    block = model.transformer.h[0]
    assert block.attn.attn_dropout.p == 0
    assert block.attn.resid_dropout.p == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("nowhere.gguf", "no file"),
    ],
)
def test_paths_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_source(name)


def test_a_folder_without_a_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no config\.json.*readme\.txt"):
        resolve_source(str(tmp_path))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="init random"):
        load_model(str(folder))


def test_incomplete_weights_are_refused_not_made_up(tmp_path: Path) -> None:
    file = llama_folder(tmp_path / "m") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path / "m"))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    file = llama_folder(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(str(tmp_path / "m"))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(str(folder))


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ConfigError, match="Name one by tokenizer"):
        load_tokenizer(str(folder))


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match="cannot be read as a GGUF model"):
        resolve_source(str(file))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_gguf_file_is_converted_without_the_librarys_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bar is turned off by no setting; it is there again for whoever wants it."""
    bar = modeling_gguf_pytorch_utils.tqdm

    def from_pretrained(**_: object) -> LlamaForCausalLM:
        assert list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="Converting")) == [0, 1, 2]
        model = LlamaForCausalLM.from_pretrained(llama_folder(tmp_path / "llama"))
        model.config.quantization_config = {}
        return model

    tokenizer = AutoTokenizer.from_pretrained(llama_folder(tmp_path / "llama"))
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.AutoTokenizer, "from_pretrained", lambda **_: tokenizer)
    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    capsys.readouterr()
    assert (gguf.convert_gguf(tmp_path / "m.gguf") / "model.safetensors").is_file()
    assert "Converting" not in capsys.readouterr().err
    assert modeling_gguf_pytorch_utils.tqdm is bar
