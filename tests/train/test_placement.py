"""Where a run's model is made: straight on its device, or on the CPU if it is to be sharded.

PyTorch's meta device stands in for another one: it is not the CPU, and takes any weights.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusion
import pytest
import torch
from runs import llama_folder, run_config, write_rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import samestep.models.load_diffusion
from samestep.errors import ConfigError
from samestep.models import load
from samestep.models.load import load_model
from samestep.models.load_diffusion import load_diffusion
from samestep.models.lora import add_lora, num_embeddings
from samestep.models.placement import DRAWN, made_on
from samestep.models.vocabulary import grow_embeddings
from samestep.models.weightless import is_weightless
from samestep.train import after, origin, setup, sharding
from samestep.train.finished import GenerateArguments
from samestep.train.origin import differences, origin_of
from samestep.train.recipes.base import load_frozen, recipe_for
from samestep.train.sharding import lay_out

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 20)
    return folder


RANK = 3
"""Of adapters; no size of the model."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Devices on which weights have been; PEFT draws adapters on the CPU, and moves them."""
    found: set[str] = set()
    register = nn.Module.register_parameter

    def noted(self: nn.Module, name: str, weight: Any) -> None:
        if weight is not None and RANK not in weight.shape:
            found.add(weight.device.type)
        register(self, name, weight)

    monkeypatch.setattr(nn.Module, "register_parameter", noted)
    monkeypatch.setattr(load, "check_finite", lambda *_: None)  # meta weights have no numbers
    return found


@pytest.mark.parametrize("init", ["random", "pretrained"])
@pytest.mark.parametrize("lora", [None, RANK])
def test_no_weight_is_ever_on_the_cpu(
    files: Path, monkeypatch: pytest.MonkeyPatch, made: set[str], init: str, lora: int | None
) -> None:
    recipe = recipe_for(run_config(files, init=init, lora_rank=lora, precision="float32"))
    tokenizer = recipe.load_tokenizer(str(files / "tiny"))
    data = [recipe.read(str(files / "rows.jsonl"), tokenizer)]
    monkeypatch.setattr(recipe, "choose_padding", lambda _: "none")  # it compares numbers
    monkeypatch.setattr(setup, "cut_last_layer", lambda *_: None)
    made.clear()
    model, _ = setup._place_model(recipe, data, device=META, tokenizer=tokenizer)
    assert {weight.device for weight in model.parameters()} == {META}
    assert made == {"meta"}


def test_a_second_model_is_read_to_where_the_first_one_is(files: Path, made: set[str]) -> None:
    with made_on(META):
        model = load_model(str(files / "tiny"))
    made.clear()
    load_frozen(str(files / "tiny"), model, field="teacher", trust_remote_code=False)
    assert made == {"meta"}


def test_a_finished_model_that_answers_is_read_to_its_device(
    files: Path, monkeypatch: pytest.MonkeyPatch, made: set[str]
) -> None:
    monkeypatch.setattr(after, "find_device", lambda _: META)
    with pytest.raises(RuntimeError, match="on meta tensors"):  # which cannot answer
        list(after.answers_to(GenerateArguments(run=str(files / "tiny"), prompt=("a",), tokens=1)))
    assert made == {"meta"}


def test_on_the_cpu_random_weights_are_those_that_they_were(files: Path) -> None:
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(files / "tiny")
    wanted = AutoModelForCausalLM.from_config(config).state_dict()
    with made_on(CPU):
        found = load_model(str(files / "tiny"), init="random", seed=3).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("init", ["random", "pretrained"])
@pytest.mark.parametrize(
    "auto_class", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"]
)
def test_what_is_made_straight_on_a_device_is_the_same_model(
    files: Path, monkeypatch: pytest.MonkeyPatch, auto_class: str, init: Any
) -> None:
    """On the CPU, by what another device is given: weights, buffers, a new head, and no hooks."""
    options = {"auto_class": auto_class, "init": init, "seed": 5}
    wanted = load_model(str(files / "tiny"), **options)
    monkeypatch.setattr(load, "building", lambda: CPU)
    monkeypatch.setattr(load, "reading", lambda: {"device_map": {"": CPU}})
    found = load_model(str(files / "tiny"), **options)
    for kind in ("named_parameters", "named_buffers"):
        pairs = [dict(getattr(model, kind)()) for model in (found, wanted)]
        assert pairs[0].keys() == pairs[1].keys() != set()
        assert all(torch.equal(pairs[0][name], tensor) for name, tensor in pairs[1].items())
    assert not [module for module in found.modules() if hasattr(module, "_hf_hook")]
    assert found.training
    assert found.stored_dtype == wanted.stored_dtype


def test_diffusion_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion.video_folder(tmp_path / "tiny")
    options: dict[str, Any] = {"init": "pretrained", "dtype": torch.float32, "seed": 0}
    wanted = load_diffusion(str(tmp_path / "tiny"), **options)
    monkeypatch.setattr(
        samestep.models.load_diffusion, "reading", lambda: {"device_map": {"": CPU}}
    )
    found = load_diffusion(str(tmp_path / "tiny"), **options)
    weights = dict(found.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in wanted.named_parameters())
    assert not [module for module in found.modules() if hasattr(module, "_hf_hook")]
    with made_on(META):
        drawn = load_diffusion(str(tmp_path / "tiny"), **{**options, "init": "random"})
    assert {weight.device for weight in drawn.parameters()} == {META}


class Placed(nn.Linear):
    """A model that says that it is where it was sent."""

    def to(self, *device: Any, **_: Any) -> Any:
        self.sent = device
        return self


@pytest.mark.parametrize(
    ("room", "wanted"), [(1e9, "cuda:1"), (1e3, "cpu")], ids=["replicated", "sharded"]
)
def test_several_gpus_weigh_the_model_before_they_load_it(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: float,
    wanted: str,
) -> None:
    """Each rank then makes it on its own device, or on the CPU where shards are cut from it."""
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, room))
    monkeypatch.setattr(sharding, "dist", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(sharding, "shard", lambda model, *_, **__: model)
    made: list[str] = []

    def make(place: torch.device) -> nn.Module:
        sharding.log.info("made")
        if not is_weightless():
            made.append(str(place))
        return Placed(30, 30, device="meta" if is_weightless() else "cpu")

    caplog.set_level("INFO", logger="samestep")
    lay_out(make, run_config(files), device=torch.device("cuda:1"))
    assert made == [wanted]
    assert [record.message for record in caplog.records].count("made") == 1


def test_a_model_that_must_be_loaded_to_be_weighed_is_loaded_on_the_cpu(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e9, 1e9))
    made: list[torch.device] = []

    def make(place: torch.device) -> nn.Module:
        if is_weightless():
            raise ConfigError("code of the user's own looked at a weight")
        made.append(place)
        return Placed(30, 30)

    model = lay_out(make, run_config(files), device=torch.device("cuda:1"))
    assert made == [CPU]
    assert model.sent == (torch.device("cuda:1"),)


def test_ranks_start_as_one_where_weights_were_drawn(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[nn.Module] = []
    monkeypatch.setattr(sharding, "start_as_rank_0", told.append)
    source = str(files / "tiny")
    grown = load_model(source)
    grow_embeddings(grown, num_embeddings(grown) + 1)
    drawn = [
        load_model(source, init="random"),
        load_model(source, auto_class="AutoModelForSequenceClassification"),
        grown,
        add_lora(
            load_model(source, init="random"), 2, alpha=4, dropout=0, targets=["q_proj"], seed=0
        ),
    ]
    for model in [*drawn, load_model(source)]:
        lay_out(lambda _, model=model: model, run_config(files), device=META)  # type: ignore[misc]
    assert told == drawn


@pytest.mark.parametrize("lora", [None, RANK])
def test_a_resumed_run_has_its_frozen_random_weights_again_or_is_refused(
    files: Path, monkeypatch: pytest.MonkeyPatch, lora: int | None
) -> None:
    """Checkpoints hold what trains; frozen weights are drawn anew, by a device that may be new."""
    settings = run_config(files, init="random", lora_rank=lora)
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(lora is None)
    before = origin_of(settings, model)
    assert not differences(before, origin_of(settings, model))
    earlier = {name: value for name, value in before.items() if "random" not in name}
    assert not differences(earlier, before)  # earlier versions drew on the CPU
    monkeypatch.setattr(origin, "_generator", lambda _: "NVIDIA H200")
    found = differences(before, origin_of(settings, model))
    assert found == ([] if lora is None else OTHER)


OTHER = ["model: random weights, drawn on: was cpu, is NVIDIA H200"]


@pytest.mark.parametrize(
    ("objective", "drawn", "wanted"),
    [("dpo", True, OTHER), ("dpo", False, []), ("causal_lm", True, [])],
)
def test_so_is_one_whose_reference_has_drawn_rows(
    files: Path, monkeypatch: pytest.MonkeyPatch, objective: str, drawn: bool, wanted: list[str]
) -> None:
    """It is the start, made anew; without one the rows of new tokens are in the checkpoints."""
    settings, model = run_config(files, objective=objective, lora_rank=RANK), nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    setattr(model, DRAWN, drawn)
    before = origin_of(settings, model)
    monkeypatch.setattr(origin, "_generator", lambda _: "NVIDIA H200")
    assert differences(before, origin_of(settings, model)) == wanted
