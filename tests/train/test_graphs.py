"""A run with compiled layers: graphs of all layers, packs and modes, counted over a real run.

Twelve layers, more than the compiler's own limit of graphs: what is made for each layer shows.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_graphs import Graphs, count_graphs
from runs import run_config, write_rows
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import samestep
from samestep.models import compiled
from samestep.models.compiled import compile_layers
from samestep.models.dropout import key_dropout, replace_dropout
from samestep.train import trainer
from samestep.train.settings.base import TrainSettings

LAYERS = 12
GRAPHS = {"plain": 2, "lora": 3, "dropout": 3, "dpo": 4}
"""With a gradient and without; of the first layer under adapters, whose input has no gradient; and
with the adapters off."""
ALWAYS = "plain", "float32"
"""The case that every run of the tests has: making graphs takes seconds each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and pairs."""
    found = tmp_path_factory.mktemp("twelve")
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(found / "tiny")
    tokenizer.save_pretrained(found / "tiny")
    rows = write_rows(found / "rows.jsonl", 8).read_text(encoding="utf-8").splitlines()
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No. " * (at % 4 + 1)}
        for at, row in enumerate(map(json.loads, rows))
    ]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (found / "pairs.jsonl").write_text(lines, encoding="utf-8")
    return found


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield count_graphs(monkeypatch)
    torch._dynamo.reset()


@dataclass
class Seen:
    """What a run did after its set-up.

    Attributes:
        forwards: Of the model.
        layers: That were compiled.
    """

    forwards: int = 0
    layers: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, graphs: Graphs) -> Seen:
    found, embed, ready = Seen(), nn.Embedding.forward, trainer.set_up

    def embedded(self: nn.Embedding, ids: Tensor) -> Tensor:
        # Under the check of the first evaluation layers run as they are, on purpose.
        found.forwards += torch._dynamo.eval_frame._stance.stance != "force_eager"
        return embed(self, ids)

    def set_up(settings: TrainSettings, **more: Any) -> Any:
        setup = ready(settings, **more)
        found.forwards = graphs.runs = 0
        found.layers = len(compiled.compiled_layers(setup.model))
        return setup

    monkeypatch.setattr(nn.Embedding, "forward", embedded)
    monkeypatch.setattr(trainer, "set_up", set_up)
    return found


def config(folder: Path, out: Path, kind: str = "plain", **changes: Any) -> TrainSettings:
    data = folder / ("pairs.jsonl" if kind == "dpo" else "rows.jsonl")
    settings: dict[str, Any] = {"precision": "float32", "compile": "layers", "micro_batch": 2}
    settings |= {"data": str(data), "batch_size": 5, "steps": 3, "keep": 0, "out": str(out)}
    if kind != "plain":
        settings |= {"lora_rank": 2, "lora_targets": ["q_proj"]}
    if kind == "dropout":
        settings["lora_dropout"] = 0.1
    if kind == "dpo":
        settings["objective"] = "dpo"
    return run_config(folder, **(settings | changes))


CASES = [
    pytest.param(kind, precision, marks=() if (kind, precision) == ALWAYS else pytest.mark.thorough)
    for kind in GRAPHS
    for precision in ("float32", "mixed")
]


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_a_run_needs_few_graphs_and_every_layer_runs_in_them(
    folder: Path,
    tmp_path: Path,
    graphs: Graphs,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    precision: str,
) -> None:
    """Ragged packs of one sequence and more, and evaluations before, between and after."""
    caplog.set_level(logging.INFO)
    data = str(folder / ("pairs.jsonl" if kind == "dpo" else "rows.jsonl"))
    evaluate = {"eval_data": data, "eval_every": 2}
    settings = config(folder, tmp_path / "out", kind, precision=precision, **evaluate)
    assert trainer.train(settings)["steps"] == 3
    # Where dropout is drawn for whole sequences, the last layer is not cut to the targets.
    assert seen.layers == (LAYERS if kind == "dropout" else LAYERS - 1)
    assert graphs.runs == seen.layers * seen.forwards > 0
    assert graphs.made == GRAPHS[kind] <= compiled.MOST_GRAPHS
    assert "uncompiled" not in caplog.text


class Layer(GradientCheckpointingLayer):
    """What transformers takes for a decoder layer, small enough to be traced at once."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(p)

    def forward(self, states: Tensor, kind: str = "", past_key_values: Any = None) -> Tensor:
        return self.dropout(self.linear(states)) + len(kind)


class Layers(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(p) for _ in range(LAYERS))

    def forward(self, states: Tensor, **more: Any) -> Tensor:
        for layer in self.layers:
            states = layer(states, **more)
        return states


def outputs(model: nn.Module) -> Tensor:
    return model(torch.ones(1, 3, 4))


def test_dropouts_share_their_graphs(graphs: Graphs) -> None:
    model = Layers(p=0.5)
    assert replace_dropout(model) == LAYERS
    micro = {"input_ids": torch.ones(1, 3).long(), "example_ids": torch.tensor([3])}
    key_dropout(model, micro, seed=0, step=1)
    before = outputs(model)
    assert compile_layers(model, lambda: outputs(model)) == ""
    assert torch.equal(outputs(model), before)
    assert graphs.runs == 2 * LAYERS
    assert graphs.made == 2  # the first layer's input has no gradient


def test_what_is_given_a_cache_runs_uncompiled_and_it_is_said_once(
    graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    """As in generation: each layer writes its own part of the cache."""
    caplog.set_level(logging.INFO, "samestep")
    model = Layers()
    assert compile_layers(model, lambda: outputs(model)) == ""
    made, runs = graphs.made, graphs.runs
    for _ in range(2):
        model(torch.ones(1, 3, 4), past_key_values=DynamicCache())
    assert (graphs.made, graphs.runs) == (made, runs)
    assert caplog.text.count("given a cache of keys and values run uncompiled") == 1
    outputs(model)
    assert graphs.runs == runs + LAYERS


def test_a_model_that_brings_a_cache_of_its_own_is_not_said_to_be_compiled(graphs: Graphs) -> None:
    model = Layers()

    def generating() -> Tensor:
        return model(torch.ones(1, 3, 4), past_key_values=DynamicCache())

    assert "pass use_cache=False" in compile_layers(model, generating)
    assert compiled.compiled_layers(model) == []


def test_beyond_the_limit_layers_run_uncompiled_and_it_is_said_once(
    graphs: Graphs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 3)
    limit, model = torch._dynamo.config.recompile_limit, Layers()
    assert compile_layers(model, lambda: outputs(model)) == ""
    assert graphs.made == 2
    states = torch.ones(1, 3, 4, requires_grad=True)
    wanted = [model(states, kind=kind) - len(kind) for kind in ("", "a")]
    assert graphs.made == 3
    for kind in ("bb", "ccc"):
        assert model(states, kind=kind).shape == wanted[0].shape
    assert graphs.made == 3
    assert compiled.compiled_layers(model) == []
    assert caplog.text.count("from here on layers run uncompiled, which is slower") == 1
    assert "that they need more than 3 graphs" in caplog.text
    assert "hit config" not in caplog.text
    assert torch._dynamo.config.recompile_limit == limit


def test_a_second_run_in_a_process_has_graphs_of_its_own(graphs: Graphs) -> None:
    """The compiler counts them by the code that it compiles, which all models would share."""
    for number in range(1, 6):
        model = Layers()
        assert compile_layers(model, lambda model=model: outputs(model)) == ""
        assert graphs.made == 2 * number
    limit = torch._dynamo.config.recompile_limit
    assert graphs.made > limit


LOSS = """
import samestep

def loss(model, micro):
    outputs = model(**samestep.model_inputs(micro))
    assert list(outputs) == ["logits"], list(outputs)
    targets = micro["labels"][:, 1:].clamp(min=0)
    mask = micro["labels"][:, 1:] >= 0
    log_p = outputs.logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return samestep.Term(-(log_p * mask).sum(), unit="token")
"""


def test_a_loss_of_the_users_own_runs_the_model_without_a_cache(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(LOSS, encoding="utf-8")
    own = {"objective": f"{tmp_path / 'own.py'}:loss", "compile": "none"}
    setup = trainer.set_up(config(folder, tmp_path / "out", **own))
    micros = list(setup.micro_batches.batches(range(4), 0))
    samestep.backward(setup.model, micros, setup.objective.loss_fn)
    assert setup.model.config.use_cache
