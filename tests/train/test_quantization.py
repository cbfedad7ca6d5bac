"""Adapters over weights of 4 and 8 bits: the gradient of the dequantised base, for any cut."""

import copy
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from cases import V, build, cut, gradients, plain_objective, ragged, worst
from peft import PeftModel
from runs import bert_folder, gpt2_folder, llama_folder, run_config, write_rows
from safetensors.torch import load_file, save_file
from thread_ranks import thread_ranks
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import samestep
from samestep.cli import main
from samestep.errors import ConfigError
from samestep.kernels.gemm import speed_up_linear
from samestep.models.load import load_model
from samestep.models.lora import LoraVariant, add_lora
from samestep.models.quantized import QuantizedLinear, quantized_layers
from samestep.train.after import load_finished
from samestep.train.command import check_paths, read_settings
from samestep.train.trainer import train

BITS = ("4bit", "8bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    build("llama", torch.float32).save_pretrained(path / "cases")
    llama_folder(path / "tiny")
    write_rows(path / "rows.jsonl", 12)
    write_rows(path / "other.jsonl", 4, seed=1)
    return path


def moved(model: Any, **variant: Any) -> Any:
    """With adapters that do something."""
    options = {"alpha": 4.0, "dropout": 0.0, "seed": 0, "variant": LoraVariant(**variant)}
    model = add_lora(model, 2, targets=("all-linear",), **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    return model


def rounded(weight: Tensor, bits: str) -> Tensor:
    """A weight, quantised and back by bitsandbytes itself."""
    if bits == "4bit":
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return bnb.dequantize_4bit(packed, state)
    packed, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return bnb.int8_vectorwise_dequant(packed, scales)


def quantised(folder: Path, bits: Any, dtype: torch.dtype = torch.float64) -> Any:
    return load_model(str(folder / "cases"), dtype=dtype, quantization=bits)


def by_hand(folder: Path, bits: str) -> Any:
    """A plain model in float64 with the weights that quantised ones stand for."""
    model = load_model(str(folder / "cases"), dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data = rounded(layer.weight.data, bits)
    return model.double()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("bits", "variant"), [("4bit", {}), ("8bit", {}), ("4bit", {"dora": True})], ids=str
)
def test_no_split_changes_the_gradient(folder: Path, bits: str, variant: dict[str, Any]) -> None:
    """It is that of whole weights which the stored ones stand for, on two ranks as well."""
    reference, examples = moved(by_hand(folder, bits), **variant), ragged(7)
    plain_objective(reference, examples).backward()
    expected = gradients(reference)
    model = moved(quantised(folder, bits), **variant)
    assert len(quantized_layers(model)) == 14
    assert speed_up_linear(copy.deepcopy(model)) > 0  # of adapters and head, not of these
    assert not isinstance(model.get_output_embeddings(), QuantizedLinear)
    for sizes, padding in (([1], "none"), ([3, 2], "left")):
        samestep.backward(model, cut(model, examples, sizes, padding), samestep.CausalLMLoss())
        assert worst(gradients(model), expected) < 1e-12
    models = [copy.deepcopy(model), model]
    with thread_ranks(2) as world:
        parts = [cut(models[at], examples[at * 5 : at * 5 + 5], [2], "right") for at in (0, 1)]
        world.run(lambda at: samestep.backward(models[at], parts[at], samestep.CausalLMLoss()))
    assert worst(gradients(model), expected) < 1e-12
    whole = moved(load_model(str(folder / "cases"), dtype=torch.float64), **variant)
    plain_objective(whole, examples).backward()
    assert worst(gradients(whole), expected) > 1e-4  # the comparison sees the rounding


@pytest.mark.parametrize("bits", BITS)
def test_products_have_the_type_of_the_precision(folder: Path, bits: str) -> None:
    layer = quantised(folder, bits, torch.float32).model.layers[0].mlp.up_proj
    assert layer.packed.element_size() * layer.packed.numel() == 32 * 48 // (8 // int(bits[0]))
    states = torch.randn(3, 5, 32, requires_grad=True)
    outer = 50 * torch.ones(1, 5, 32)  # what bitsandbytes' own product would see in its neighbours
    assert torch.allclose(layer(torch.cat([states, outer]))[:3], layer(states), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(states)
    wide = layer.weight.bfloat16()
    assert torch.equal(low, nn.functional.linear(states.bfloat16(), wide))
    low.sum().backward()
    assert states.grad is not None
    ones = torch.ones(15, 48, dtype=torch.bfloat16)
    assert torch.equal(states.grad.view(-1, 32), (ones @ wide).float())


QLORA: dict[str, Any] = {
    "lora_rank": 2,
    "lora_dropout": 0.2,
    "precision": "float64",
    "optimizer": "sgd",
    "lr": 1.0,
    "steps": 2,
    "save_every": 1,
    "micro_batch": 8,
}


def run(folder: Path, out: str, **changes: Any) -> dict[str, Tensor]:
    train(run_config(folder, out=str(folder / out), **{**QLORA, **changes}))
    return load_file(folder / out / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="module", params=BITS)
def finished(folder: Path, request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor]]:
    bits = str(request.param)
    other = str(folder / "other.jsonl")
    return bits, run(folder, bits, quantization=bits, steps=1, save_every=None, eval_data=other)


def _one_off(layer: Any, name: str, tensor: Tensor, persistent: bool) -> None:
    stored = tensor ^ 1 if name == "packed" else tensor
    nn.Module.register_buffer(layer, name, stored, persistent)


def test_a_run_is_the_same_for_every_split_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, "long", quantization="4bit")
    assert all(weight.dtype == torch.float64 for weight in whole.values())
    split = run(folder, "split", quantization="4bit", micro_batch=1, padding="left")
    assert worst(split, whole) < 1e-12
    checkpoints = folder / "long" / "checkpoints"
    kept = load_file(next((checkpoints / "step-00000001").glob("*.safetensors")))
    assert all("lora_" in name for name in kept)  # the base is not in checkpoints
    shutil.rmtree(checkpoints / "step-00000002")
    with pytest.raises(ConfigError, match="quantization"):
        run(folder, "long", quantization="8bit", resume=True)
    with monkeypatch.context() as patch:  # another release that rounds otherwise
        patch.setattr(QuantizedLinear, "register_buffer", _one_off)
        with pytest.raises(ConfigError, match="model: quantised weights: other content"):
            run(folder, "long", quantization="4bit", resume=True)
    resumed = run(folder, "long", quantization="4bit", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_what_is_done_with_it_afterwards(
    folder: Path, finished: tuple[str, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged weights are those that were trained over: the dequantised ones with the adapters."""
    bits, _ = finished
    model, _ = load_finished(str(folder / bits))
    assert quantized_layers(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    merged = folder / f"{bits}-merged"
    assert main(["export", str(folder / bits), "--out", str(merged), "--merge"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)
    assert f"quantization: {bits}" in (merged / "README.md").read_text("utf-8")
    adapters = folder / f"{bits}-adapters"
    assert main(["export", str(folder / bits), "--out", str(adapters)]) == 0
    # As the page says that PEFT and transformers load them.
    options = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny", quantization_config=options)
    base.enable_input_require_grads()  # bitsandbytes' product of training: no padding of blocks
    loaded = PeftModel.from_pretrained(base, str(adapters)).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0.05)
    capsys.readouterr()
    assert main(["eval", str(folder / bits), "--data", str(folder / "other.jsonl")]) == 0
    loss = float(capsys.readouterr().out.split()[1])
    said = (folder / bits / "eval.jsonl").read_text("utf-8").splitlines()[-1]
    assert f'"loss": {loss:.4}'[:12] in said


def test_merged_into_the_model_of_a_run(folder: Path) -> None:
    """GPT-2's layers are transposed ones; what is mixed has adapters in float32."""
    gpt2_folder(folder / "gpt2")
    shared = {"model": str(folder / "gpt2"), "quantization": "4bit", "lora_dropout": 0.0}
    mixed = {**shared, "precision": "mixed", "optimizer": "adamw", "lr": 1e-2}
    adapters = run(folder, "mixed", **mixed)
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    given = {**QLORA, **mixed, "merge": True}
    train(run_config(folder, out=str(folder / "merged"), **given))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged" / "model", dtype="auto").eval()
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    model, _ = load_finished(str(folder / "mixed"))
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=0, atol=2e-3)


def test_a_model_that_is_stored_in_few_bits(folder: Path) -> None:
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    path = folder / "stored"
    AutoModelForCausalLM.from_pretrained(
        folder / "cases", quantization_config=options
    ).save_pretrained(path)
    ids = torch.arange(3, 12)[None] % V
    own = load_model(str(path), dtype=torch.float32, quantization="4bit")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    # A head that the files lack is new, and so it is whole.
    head = "AutoModelForSequenceClassification"
    new = load_model(str(path), auto_class=head, quantization="4bit")
    plain = load_model(str(folder / "cases"), auto_class=head)
    assert len(quantized_layers(new)) == 14
    assert torch.equal(new.score.weight, plain.score.weight)
    for wrong in (None, "8bit"):
        with pytest.raises(ConfigError, match=r"stored in 4 bits by bitsandbytes: .*4bit"):
            load_model(str(path), quantization=wrong)


def test_what_cannot_be_is_said_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["--model", str(folder / "tiny"), "--data", str(folder / "rows.jsonl"), "--out", "o"]
    with pytest.raises(ConfigError, match="quantization is given without lora_rank"):
        read_settings([*files, "--quantization", "4bit"])
    lora = [*files, "--lora-rank", "2", "--quantization", "4bit"]
    with pytest.raises(ConfigError) as found:
        read_settings([*lora, "--init", "random", "--parallel", "fsdp2", "--compile", "layers"])
    assert "not under parallel fsdp2" in str(found.value)
    assert "init random has none" in str(found.value)
    assert "quantised weights run uncompiled" in str(found.value)
    for name in ("--load-in-4bit", "--quantization-bit", "--load-in-8bit"):
        with pytest.raises(ConfigError, match=r"--quantization \(4bit or 8bit, with lora_rank\)"):
            read_settings([*files, name, "4"])
    with pytest.raises(ConfigError, match="'mlp' holds quantised weights"):
        moved(quantised(folder, "8bit"), modules_to_save=("mlp",))
    monkeypatch.setattr("samestep.utils.extras.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes, accelerate: pip install .*\[quant\]"):
        check_paths(read_settings(lora))
    assert sys.modules.get("kernels", 0) is not None


@pytest.mark.parametrize("bits", BITS)
def test_layers_that_the_files_lack_stay_whole(folder: Path, bits: Any) -> None:
    """BERT's pooler, beside the head: both train, or would be random numbers in few bits."""
    bert_folder(folder / "bert")
    head = "AutoModelForSequenceClassification"
    model = load_model(str(folder / "bert"), auto_class=head, quantization=bits)
    plain = load_model(str(folder / "bert"), auto_class=head)
    assert len(quantized_layers(model)) == 12
    for name in ("bert.pooler.dense", "classifier"):
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_numbers_that_are_not_finite_are_found_before_they_are_rounded(folder: Path) -> None:
    damaged = shutil.copytree(folder / "cases", folder / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj.weight has 1 of 1,536"):
        load_model(str(damaged), quantization="4bit")


def test_only_adapters_load_peft_which_loads_bitsandbytes() -> None:
    """Where it is installed, PEFT imports it: seconds, and a kernel fetched from the Hub."""
    files = (Path(samestep.__file__).parent).rglob("*.py")
    assert not [path for path in files if re.search(r"^(from|import) peft", path.read_text(), re.M)]
    assert sys.modules.get("kernels", "absent") is not None  # it was put out of sight, and is back
