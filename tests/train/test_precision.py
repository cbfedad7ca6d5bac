"""`precision`: what is multiplied in bfloat16, what stays float32, and what that costs."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import gradients
from objective_runs import CASES, configured
from runs import llama_folder, run_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import samestep
from samestep.errors import ConfigError
from samestep.train import precision, trainer
from samestep.train import setup as train_setup
from samestep.train.command import read_settings
from samestep.train.forward import with_keyed_dropout
from samestep.train.recipes.base import recipe_for
from samestep.train.settings.base import TrainSettings, finalize
from samestep.train.setup import load_trainable, set_up
from samestep.train.trainer import train


def gradient(settings: TrainSettings, **changes: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of the first 16 records, by name."""
    setup = set_up(finalize(settings.model_copy(update=changes)))
    loss_fn = with_keyed_dropout(setup.objective.loss_fn, seed=0, step=0)
    micro_batches = list(setup.micro_batches.batches(range(16), 0))
    with precision.one_step(torch.device("cpu")):
        loss, _ = samestep.backward(
            setup.model, micro_batches, loss_fn, counters=setup.objective.counters
        )
    return loss, gradients(setup.model)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of the whole gradient, relative."""
    differences = [(found[name].double() - one.double()).norm() for name, one in wanted.items()]
    sizes = [one.double().norm() for one in wanted.values()]
    return float(torch.stack(differences).norm() / torch.stack(sizes).norm())


def with_its_head(settings: TrainSettings, folder: Path) -> TrainSettings:
    """The settings with a model whose head, if it is new, has the same weights in every type."""
    setup = set_up(finalize(settings.model_copy(update={"precision": "float32"})))
    setup.model.save_pretrained(folder)
    setup.tokenizer.save_pretrained(folder)
    return settings.model_copy(update={"model": str(folder)})


class PlainAutocast:
    """What people write: autocast around a plain loss, its own cross entropy in float32."""

    def __call__(self, model: nn.Module, micro: Any) -> samestep.Term:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(micro["input_ids"], attention_mask=micro["attention_mask"]).logits
        labels = micro["labels"][:, 1:]
        nll = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="sum"
        )
        return samestep.Term(nll, "token")


def test_no_worse_than_plain_autocast(tmp_path: Path) -> None:
    settings = run_config(tmp_path, padding="right")
    wanted = gradient(settings, precision="float64")[1]
    mixed = gradient(settings, precision="mixed")[1]
    setup = set_up(finalize(settings.model_copy(update={"precision": "float32"})))
    samestep.backward(setup.model, list(setup.micro_batches.batches(range(16), 0)), PlainAutocast())
    plain = distance(gradients(setup.model), wanted)
    assert 1e-4 < distance(mixed, wanted) < 1.5 * plain
    assert distance(gradient(settings, precision="float32")[1], wanted) < 1e-5


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "knobs",
    [{"micro_batch": 1}, {"padding": "right"}, {"gradient_checkpointing": "selective"}],
    ids=str,
)
def test_knobs_differ_by_no_more_than_the_precision_s_own_error(
    tmp_path: Path, knobs: dict[str, Any]
) -> None:
    settings = run_config(tmp_path)
    wanted = gradient(settings, precision="float64")[1]
    one = gradient(settings, precision="mixed")[1]
    other = gradient(settings, precision="mixed", **knobs)[1]
    assert distance(other, one) < 1.5 * distance(one, wanted)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("case", CASES)
def test_every_objective_keeps_its_digits(tmp_path: Path, case: str) -> None:
    settings = with_its_head(configured(tmp_path, case), tmp_path / "headed")
    wanted_loss, wanted = gradient(settings, precision="float64")
    loss, mixed = gradient(settings, precision="mixed")
    low = distance(gradient(settings, precision="bfloat16")[1], wanted)
    assert {one.dtype for one in mixed.values()} == {torch.float32}
    assert distance(mixed, wanted) < 1.5 * low
    assert loss == pytest.approx(wanted_loss, rel=1e-2, abs=1e-2)


def test_weights_are_cast_once_a_step(tmp_path: Path) -> None:
    casts: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            cast = function is torch.ops.aten._to_copy.default
            if cast and kwargs.get("dtype") == torch.bfloat16 and args[0].requires_grad:
                casts.append(tuple(args[0].shape))
            return function(*args, **kwargs)

    settings = run_config(tmp_path, precision="mixed", micro_batch=1)
    with Watch():
        gradient(settings)
    layer = (48, 32)  # gate and up, of both layers; the probes before the step cast them as well
    whole = casts.count(layer)
    casts.clear()
    with Watch():
        gradient(settings.model_copy(update={"micro_batch": 16}))
    assert whole == casts.count(layer) > 0


def test_updates_that_bfloat16_rounds_away(tmp_path: Path) -> None:
    """Each step moves a weight of 0.1 by 1e-5: bfloat16 has no number in between."""
    moved = {}
    start = load_file(llama_folder(tmp_path / "start") / "model.safetensors")
    name = "model.norm.weight"  # ones
    for kind in ("mixed", "bfloat16", "float32"):
        out = tmp_path / kind
        train(run_config(tmp_path, out=str(out), precision=kind, steps=3, lr=1e-4))
        end = load_file(out / "model" / "model.safetensors")
        moved[kind] = float((end[name].float() - start[name]).norm())
    assert moved["bfloat16"] == 0
    assert moved["mixed"] == pytest.approx(moved["float32"], rel=0.05)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "lora_dropout": 0.1}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    common = {"precision": "mixed", "save_every": 2, **changes}
    train(run_config(tmp_path, out=str(tmp_path / "whole"), **common))
    real, calls = trainer.step, iter(range(100))

    def dies_in_the_fifth(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise RuntimeError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(trainer, "step", dies_in_the_fifth)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run_config(tmp_path, out=str(tmp_path / "broken"), **common))
    monkeypatch.undo()
    train(run_config(tmp_path, out=str(tmp_path / "broken"), **common, resume=True))
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    one, other = (load_file(tmp_path / out / "model" / name) for out in ("whole", "broken"))
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("objective", "head"), [("causal_lm", False), ("classification", True)])
def test_lora_keeps_the_base_in_bfloat16_and_trains_float32(
    tmp_path: Path, objective: str, head: bool
) -> None:
    setup = set_up(
        configured(
            tmp_path, objective + (" dft" if not head else ""), lora_rank=2, precision="mixed"
        )
    )
    trained = {n: w.dtype for n, w in setup.model.named_parameters() if w.requires_grad}
    frozen = {w.dtype for w in setup.model.parameters() if not w.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert frozen == {torch.bfloat16} if not head else torch.bfloat16 in frozen
    assert any("score" in name for name in trained) == head


def test_the_log_says_the_bytes_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="samestep"):
        setup = set_up(run_config(tmp_path, precision="mixed"))
    assert "precision: mixed; 18 bytes for each of " in caplog.text
    settings = run_config(tmp_path, precision="mixed")
    assert sum(precision.bytes_per_weight(setup.model, settings).values()) <= 18


def test_bfloat16_says_what_it_loses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_up(run_config(tmp_path, precision="bfloat16"))
    assert "updates of less than 1/256 of a weight round away" in caplog.text


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("chosen", "speed", "said"),
    [
        ("float32", 4.0, "multiplies bfloat16 4.0 times as fast as float32: --precision mixed"),
        ("float32", 1.1, None),
        ("mixed", 0.25, "--precision float32 would be faster"),
        ("mixed", 4.0, None),
        ("float64", 4.0, None),
    ],
)
def test_a_processor_with_fast_bfloat16_is_told_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    chosen: Any,
    speed: float,
    said: str | None,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speed", lambda: speed)
    with caplog.at_level(logging.INFO, logger="samestep"):
        set_up(run_config(tmp_path, precision=chosen))
    told = [line for line in caplog.messages if "this processor multiplies" in line]
    assert len(told) == (0 if said is None else 1)
    assert said is None or said in told[0]


def test_auto_is_decided_by_the_device_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_config(tmp_path, steps=1))
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert saved["precision"] == "float32"
    with pytest.raises(ConfigError, match="precision: was 'float32', is 'mixed'"):
        train(run_config(tmp_path, steps=1, precision="mixed", resume=True))
    monkeypatch.setattr(precision, "find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert precision.choose_precision(run_config(tmp_path)).precision == "mixed"
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert precision.choose_precision(run_config(tmp_path)).precision == "float32"


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({"dtype": "float32", "mixed_precision": False}, "float32"),
        ({"dtype": "float32", "mixed_precision": True}, "mixed"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
    ids=str,
)
def test_a_run_with_the_former_names_goes_on(
    tmp_path: Path, saved: dict[str, Any], now: str
) -> None:
    train(run_config(tmp_path, steps=1, precision=now))
    path = tmp_path / "out" / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    del fields["precision"]
    path.write_text(yaml.safe_dump({**fields, **saved}))
    train(run_config(tmp_path, steps=1, precision=now, resume=True))


def test_the_former_names_say_the_new_one(tmp_path: Path) -> None:
    needed = ["--model", "m", "--data", "d", "--out", "o"]
    for flags in (["--dtype", "bfloat16"], ["--mixed-precision"]):
        with pytest.raises(
            ConfigError, match=f"{flags[0]}: no such flag; it is called --precision now"
        ):
            read_settings([*needed, *flags])


def test_autocast_does_not_reach_sums(tmp_path: Path) -> None:
    """A loss under autocast adds up in float32: 4,097 targets are no 4,096."""
    logits = torch.zeros(4097, 3)
    targets = torch.zeros(4097, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = samestep.linear_cross_entropy(logits, torch.zeros(3, 3), targets)
    assert float(sums.correct) == 4097
    assert sums.loss.dtype == torch.float32


def test_the_head_s_gradient_is_not_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16), torch.randn(32, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = samestep.linear_cross_entropy(hidden, weight, torch.arange(64) % 32).loss
    loss.backward()
    assert weight.grad is not None
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_layers_are_changed_for_cpus_alone(tmp_path: Path, kind: str) -> None:
    """What sends products through oneDNN breaks the graphs of compiled layers."""
    recipe = recipe_for(run_config(tmp_path, precision="float32"))
    data = [
        recipe.read(str(tmp_path / "rows.jsonl"), recipe.load_tokenizer(str(tmp_path / "tiny")))
    ]
    model = load_trainable(recipe, data, device=torch.device(kind))
    changed = ["forward" in vars(m) for m in model.modules() if type(m) is nn.Linear]
    assert set(changed) == {kind == "cpu"}


@pytest.mark.parametrize("compiled", ["none", "layers"])
def test_code_for_ever_new_shapes_is_bounded_before_the_first_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    """PyTorch sends low precision to oneDNN by itself, also in layers that are left as they are."""
    calls = []
    monkeypatch.setattr(train_setup, "limit_caches", lambda: calls.append(compiled))
    recipe = recipe_for(run_config(tmp_path, precision="mixed", compile=compiled))
    data = [
        recipe.read(str(tmp_path / "rows.jsonl"), recipe.load_tokenizer(str(tmp_path / "tiny")))
    ]
    load_trainable(recipe, data, device=torch.device("cpu"))
    assert calls == [compiled]
