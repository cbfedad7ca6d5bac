"""Variants of LoRA: the formulas of their papers, the same under every split, saved and resumed."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import build, cut, gradients, plain_objective, ragged, worst
from experts import build_experts
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from runs import llama_folder, run_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import samestep
from samestep.errors import ConfigError
from samestep.models.lora import LoraVariant, add_lora
from samestep.train import sharding
from samestep.train.optim import build_optimizer
from samestep.train.settings.base import finalize
from samestep.train.settings.language import CausalLMSettings
from samestep.train.sharding import choose_parallelism
from samestep.train.trainer import train

RANK, ALPHA = 2, 4.0
TARGETS = ("q_proj", r".*layers\.1\.mlp\.(up|down)_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def adapted(name: str, targets: tuple[str, ...] = TARGETS, **variant: Any) -> Any:
    """A model in float64 whose adapters do something."""
    base = build_experts(name) if name == "mixtral" else build(name)
    options = {"alpha": ALPHA, "dropout": 0.0, "seed": 0, "variant": LoraVariant(**variant)}
    model = add_lora(base, RANK, targets=targets, **options).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    return model


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("llama", {"rslora": True}),
        ("llama", {"dora": True}),
        ("qwen2", {"modules_to_save": ("lm_head", "layers.0.mlp")}),
        ("llama-tied", {"modules_to_save": ("embed_tokens",)}),
        ("llama", {"tokens": (5, 6, 7)}),
        ("llama-tied", {"tokens": (5, 6, 7)}),
        ("mixtral", {"parameters": EXPERTS}),
    ],
    ids=str,
)
def test_no_split_changes_the_gradient(name: str, variant: dict[str, Any]) -> None:
    targets = ("q_proj",) if name == "mixtral" else TARGETS
    model, examples = adapted(name, targets, **variant), ragged(10)
    plain_objective(model, examples).backward()
    expected = gradients(model)
    assert all(bool(gradient.any()) for gradient in expected.values())
    for sizes, padding in (([1], "none"), ([3, 2], "left")):
        samestep.backward(model, cut(model, examples, sizes, padding), samestep.CausalLMLoss())
        assert worst(gradients(model), expected) < 1e-12


def effective(layer: Any, variant: dict[str, Any]) -> Tensor:
    """The weight that an adapted layer multiplies by, from the formulas of the papers."""
    base, a, b = (
        part.weight.detach()
        for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )
    scale = ALPHA / (math.sqrt(RANK) if variant.get("rslora") else RANK)
    moved = base + scale * b @ a
    if not variant.get("dora"):
        return moved
    length = layer.lora_magnitude_vector["default"].weight.detach()
    return length[:, None] * moved / moved.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_adapters_are_the_papers(variant: dict[str, Any]) -> None:
    """A plain model with the weights of the formula gives the same loss; targets by pattern."""
    model, plain = adapted("llama", **variant), build("llama")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_magnitude_vector")}
    assert sorted(name.split("layers.")[1] for name in layers) == [
        *("0.self_attn.q_proj", "1.mlp.down_proj", "1.mlp.up_proj", "1.self_attn.q_proj"),
    ]
    for name, layer in layers.items():
        own: Any = plain.get_submodule(name.removeprefix("base_model.model."))
        own.weight.data = effective(layer, variant)
    examples = ragged(10)
    losses = [plain_objective(one, examples).item() for one in (model, plain, build("llama"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7 if variant.get("dora") else 1e-12)
    assert losses[0] != pytest.approx(losses[2], rel=1e-5)


def test_tied_embeddings_stay_tied_when_they_train() -> None:
    model = adapted("llama-tied", modules_to_save=("embed_tokens",))
    moved = model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, moved)
    model = adapted("llama-tied", tokens=(5, 6))
    own = build("llama-tied").lm_head.weight
    logits = model.get_output_embeddings()(torch.eye(32).double()).T
    changed = (logits - own).abs().amax(1) > 1e-9
    assert changed.nonzero().flatten().tolist() == [5, 6]


def settings(**changes: Any) -> CausalLMSettings:
    return finalize(CausalLMSettings(model="m", data="d", out="o", **changes))


def test_lora_plus_is_pefts() -> None:
    model = adapted("llama")
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    ours = build_optimizer(
        model, settings(lora_rank=RANK, lr=0.01, loraplus_lr_ratio=16.0, optimizer="adamw")
    )
    found = [
        {
            id(weight): group["lr"] if one is theirs else 0.01 * group.get("lr_scale", 1.0)
            for group in one.param_groups
            for weight in group["params"]
        }
        for one in (theirs, ours)
    ]
    assert found[0] == pytest.approx(found[1])
    assert sorted(set(found[1].values())) == pytest.approx([0.01, 0.16])


ALL: dict[str, Any] = {
    "lora_rank": 2,
    "lora_dropout": 0.2,
    "use_rslora": True,
    "use_dora": True,
    "lora_targets": r".*layers\.\d\.self_attn\.(q|v)_proj",
    "loraplus_lr_ratio": 4.0,
    "modules_to_save": "lm_head",
    "trainable_token_indices": (4, 5, 6),
    "precision": "float64",
    "optimizer": "sgd",
    "lr": 0.1,
    "steps": 3,
    "save_every": 2,
}


def test_a_run_of_all_of_them(tmp_path: Path) -> None:
    """No memory knob changes it, a resumed run is the same to the bit, and PEFT loads it."""

    def run(out: str, **changes: Any) -> dict[str, Tensor]:
        train(run_config(tmp_path, out=str(tmp_path / out), **{**ALL, **changes}))
        return load_file(tmp_path / out / "model" / "adapter_model.safetensors")

    whole, split = run("whole"), run("split", micro_batch=1, padding="left")
    assert worst(split, whole) < 1e-12
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector", "lm_head", "trainable_tokens_delta")
    assert all(any(kind in name for name in whole) for kind in kinds)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000003")
    resumed = run("whole", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float64)
    ids = torch.arange(2, 9)[None]
    before = base(ids).logits
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "whole" / "model"))
    assert not torch.allclose(loaded(ids).logits, before)
    head: Any = loaded.get_output_embeddings()
    kept = next(weight for name, weight in whole.items() if "lm_head" in name)
    assert torch.equal(head.weight, kept)


def test_what_the_model_has_not_is_named_together(tmp_path: Path) -> None:
    llama_folder(tmp_path / "tiny")
    wrong = {
        "modules_to_save": ("score",),
        "target_parameters": ("mlp.experts.gate_up_proj",),
        "trainable_token_indices": (3, 100_000),
    }
    with pytest.raises(ConfigError) as found:
        train(run_config(tmp_path, lora_rank=2, **wrong))
    for part in ("nothing is called 'score'", "'mlp.experts.gate_up_proj'", "100000: the model"):
        assert part in str(found.value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"use_dora": True, "modules_to_save": "lm_head", "loraplus_lr_ratio": 2.0},
            [f"{n} is given" for n in ("use_dora", "modules_to_save", "loraplus_lr_ratio")],
        ),
        (
            {"lora_rank": 2, "lora_dropout": 0.1, "use_dora": True, "target_parameters": "w"},
            ["leave lora_dropout out", "leave use_dora out"],
        ),
        (
            {"lora_rank": 2, "modules_to_save": "embed_tokens", "trainable_token_indices": [1]},
            ["train the same"],
        ),
        ({"lora_rank": 2, "lora_targets": "*_proj"}, ["'*_proj' is no regular expression"]),
    ],
    ids=str,
)
def test_contradictions_are_named_together(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        settings(**given)
    assert all(re.search(re.escape(part), str(found.value)) for part in parts), found.value


def test_a_split_that_matters_is_caught() -> None:
    """The comparison sees a mean of means over adapters."""
    model, examples = adapted("llama", dora=True), ragged(10)
    plain_objective(model, examples).backward()
    expected = gradients(model)

    def wrong(model: nn.Module, micro: Any) -> samestep.Term:
        own = samestep.CausalLMLoss()(model, micro)["nll"].total
        return samestep.Term(own / max(int((micro["labels"] != -100).sum()), 1), "micro-batch")

    samestep.backward(
        *(model, cut(model, examples, [3, 2], "left"), wrong),
        counters={"micro-batch": lambda _: 1.0},
    )
    assert worst(gradients(model), expected) > 1e-3


@pytest.mark.parametrize(
    "given",
    [
        {"use_dora": True},
        {"modules_to_save": ("norm",)},
        {"trainable_token_indices": (1,)},
        {"target_parameters": ("mlp.experts.gate_up_proj",)},
    ],
    ids=str,
)
def test_shards_refuse_adapters_that_read_whole_weights(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding.dist, "is_initialized", lambda: True)
    settings = CausalLMSettings(
        model="m", data="d", out="o", parallel="fsdp2", lora_rank=2, **given
    )
    with pytest.raises(ConfigError, match=f"{next(iter(given))}: not under parallel fsdp2"):
        choose_parallelism(torch.nn.Linear(2, 2), settings, device=torch.device("cpu"))
