"""``compile``: few graphs for a run of ragged packs, the same step, and a choice that is said.

Compiled layers are made of graphs; the tests count those, and run them as they are: kernels of a
compiler (and of a GPU) are not needed for that. On GPUs: written for, not yet run.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import build, gradients, ragged, worst
from counted_graphs import Graphs, attend_as_on_a_gpu
from runs import run_config
from torch import Tensor

import samestep
from samestep.data.collate import collate_examples
from samestep.errors import ConfigError
from samestep.kernels import packed_attention, varlen
from samestep.models import compiled
from samestep.models.activations import checkpoint_activations
from samestep.models.compiled import compilable_layers, compile_layers, run_eagerly
from samestep.models.probes import choose_padding, cut_last_layer
from samestep.train import compilation
from samestep.train.budget_range import ON_ACCELERATOR
from samestep.train.compilation import choose_compilation
from samestep.train.micro_tokens import Costs
from samestep.train.recipes.base import recipe_for
from samestep.train.settings.base import finalize
from samestep.train.setup import set_up

FEW = 6
"""Graphs of a run: with gradients and without, of all positions and of targets, and the like."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    found = Graphs()
    monkeypatch.setattr(compiled, "BACKEND", found)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def packs(numbers: list[int]) -> list[dict[str, Any]]:
    examples = ragged(sum(numbers))
    parts = torch.arange(len(examples)).split(numbers)
    return [collate_examples([examples[at] for at in part.tolist()]) for part in parts]


def ready(name: str = "llama") -> Any:
    """A model as a run prepares it: packed, its last layer cut to the targets."""
    model = build(name)
    assert choose_padding(model, "none") == "none"
    cut_last_layer(model, "none")
    return model


def outputs(model: Any) -> Tensor:
    micro = compilation._probe(model, padding="none")
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "max_length_q")
    found: Tensor = model(**{name: micro[name] for name in names}).logits
    return found


@pytest.fixture
def gpu_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_as_on_a_gpu(monkeypatch)


@pytest.mark.thorough  # test_graphs.py counts over whole runs
@pytest.mark.usefixtures("gpu_attention")
def test_ragged_packs_need_a_handful_of_graphs_and_change_nothing(graphs: Graphs) -> None:
    model, loss = ready(), samestep.CausalLMLoss()
    numbers = [3, 1, 8, 2, 19]
    samestep.backward(model, packs([33]), loss)
    wanted = gradients(model)
    assert compile_layers(model, lambda: outputs(model)) == ""
    before = graphs.runs
    samestep.backward(model, packs(numbers), loss)
    assert graphs.runs - before >= len(numbers) * len(compilable_layers(model))
    assert worst(gradients(model), wanted) < 1e-12
    samestep.evaluate(model, packs([4, 29]), loss)
    made = graphs.made
    assert made <= FEW
    samestep.backward(model, packs([6, 2, 3, 8, 1, 13]), loss)
    samestep.evaluate(model, packs([33]), loss)
    assert graphs.made == made
    assert worst(gradients(model), wanted) < 1e-12
    assert torch._dynamo.utils.counters["graph_break"] == {}
    # Layers that recompute run uncompiled; the step is the same.
    assert run_eagerly(model)
    assert not run_eagerly(model)
    before = graphs.runs
    checkpoint_activations(model, "selective")
    samestep.backward(model, packs(numbers), loss)
    assert worst(gradients(model), wanted) < 1e-12
    assert graphs.runs == before


@pytest.mark.usefixtures("gpu_attention")
def test_a_compiler_that_computes_something_else_is_not_used(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready()
    monkeypatch.setattr(compiled, "BACKEND", Graphs(lambda out: out * (1 + 1e-4)))
    assert "compiled layers give other outputs" in compile_layers(model, lambda: outputs(model))
    assert not run_eagerly(model)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernels here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    reason = compile_layers(model, lambda: outputs(model))
    assert reason.startswith("compiling fails here: BackendCompilerFailed: ")
    assert not run_eagerly(model)


def test_on_a_gpu_a_layer_is_one_graph_attention_included(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced only, with PyTorch's own ``varlen_attn``: its kernel needs a GPU."""
    model = ready().to(torch.bfloat16)
    layer = model.model.layers[0]
    monkeypatch.setattr(packed_attention, "has_kernels", lambda query: True)
    monkeypatch.setitem(varlen._recent, torch.device("cpu"), True)
    function = varlen.flash_function()
    assert function is not None
    varlen._names(function)  # asked before any layer is compiled, as a run does

    def run(micro: dict[str, Any]) -> Any:
        states = torch.randn(1, micro["input_ids"].shape[1], 32, dtype=torch.bfloat16)
        rotation = model.model.rotary_emb(states, micro["position_ids"])
        borders = {name: micro[name] for name in ("cu_seq_lens_q", "max_length_q")}
        return layer(states.requires_grad_(), position_embeddings=rotation, **borders)

    made = []

    def trace(module: Any, _: Any) -> Any:
        made.append([str(node.target) for node in module.graph.nodes])
        return lambda *inputs: (torch.zeros(1),)  # the kernel itself needs a GPU

    layer.compile(dynamic=True, fullgraph=True, backend=trace)
    for micro in packs([3, 2, 5]):
        run(micro)
    assert len(made) == 1
    assert any("varlen_attn" in target for target in made[0])


def test_what_something_looks_into_stays_as_it_is() -> None:
    assert len(compilable_layers(ready())) == len(build("llama").model.layers) - 1
    assert compilable_layers(torch.nn.Linear(2, 2)) == []
    assert "looks into" in compile_layers(torch.nn.Linear(2, 2), lambda: torch.zeros(1))


@pytest.mark.usefixtures("gpu_attention")
def test_a_run_compiles_its_layers_on_request(
    tmp_path: Path, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    settings = {"precision": "float64", "micro_batch": 3}
    setup = set_up(finalize(run_config(tmp_path, compile="layers", **settings)))
    assert "compile: layers, 1 of them; compiling took" in caplog.text
    plain = set_up(finalize(run_config(tmp_path, **settings)))
    found = []
    for one in (setup, plain):
        micros = list(one.micro_batches.batches(range(16), 0))
        samestep.backward(one.model, micros, one.objective.loss_fn)
        found.append(gradients(one.model))
    assert worst(*found) < 1e-12
    assert graphs.runs > 0
    assert graphs.made <= FEW
    # Memory that runs out lets layers recompute: uncompiled from there on, and it is said.
    assert setup.recipe.recompute_activations(setup.model)
    assert "compile: none from here on" in caplog.text


def test_a_run_that_cannot_have_what_it_asks_for_says_so(
    tmp_path: Path, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="one by one, which does not compile whole; with padding"):
        set_up(run_config(tmp_path, compile="layers"))
    caplog.set_level(logging.INFO, "samestep")
    set_up(run_config(tmp_path, compile="layers", padding="right"))
    assert "compile: layers, 1 of them" in caplog.text


def test_contradictions_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compile: layers that recompute or offload"):
        run_config(tmp_path, compile="layers", gradient_checkpointing="full")


PACE = Costs(0.02, 1.7e-5, None, 0.0)
"""Of a model of a billion weights: 0.4 s for a step of 22,000 tokens."""
STEP = 22_000


def choose(
    model: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    costs: list[Costs | None],
    tokens: float,
    objective: Any = None,
    cut: Any = None,
) -> None:
    """Choose for a run of so many tokens, with what a token costs before and after compiling."""
    measured = iter(costs)
    monkeypatch.setattr(compilation, "measured_costs", lambda *_, **__: next(measured))
    monkeypatch.setattr(compilation, "budget_range", lambda device: ON_ACCELERATOR)
    monkeypatch.setattr(compilation, "_on_accelerator", lambda model: True)
    monkeypatch.setattr(compilation, "has_kernels", lambda query: True)
    monkeypatch.setattr(compilation, "compile_layers", lambda model, run: "")
    recipe = recipe_for(run_config(folder))
    choose_compilation(model, objective, recipe=recipe, padding="none", cut=cut, tokens=tokens)


@pytest.mark.parametrize(
    ("steps", "costs", "wanted"),
    [
        (50, [PACE], "compiling takes about 15 s, and would save about 3 s of the 21 s that the"),
        (
            400,
            [PACE, Costs(0.01, 1.4e-5, None, 0.0)],
            "1.28 times as fast a token, about 37 s less in all; compiling took",
        ),
        (400, [PACE, Costs(0.02, 1.8e-5, None, 0.0)], "no faster here (0.95 times)"),
        # Small models wait for launches: that shows in the time that a micro-batch takes at least.
        (400, [PACE, Costs(0.0, 1.7e-5, None, 0.0)], "1.14 times as fast"),
    ],
    ids=["short", "pays", "slower", "launches"],
)
def test_auto_compiles_where_a_run_earns_it_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: int,
    costs: list[Costs | None],
    wanted: str,
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    choose(ready(), tmp_path, monkeypatch, costs=costs, tokens=steps * STEP)
    assert wanted in caplog.text


def test_adapters_have_one_more_graph_to_earn_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    model = ready()
    model.get_input_embeddings().requires_grad_(False)
    choose(model, tmp_path, monkeypatch, costs=[PACE], tokens=400 * STEP)
    assert "compiling takes about 30 s, and would save about 26 s of the" in caplog.text


def test_a_step_too_small_for_two_sizes_is_timed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    model, budgets = ready(), []

    def cut(budget: int) -> list[dict[str, Any]]:
        budgets.append(budget)
        return packs([3])

    objective = samestep.Objective(samestep.CausalLMLoss())
    options: dict[str, Any] = {"objective": objective, "cut": cut, "costs": [None, None]}
    choose(model, tmp_path, monkeypatch, tokens=1e12, **options)
    assert len(budgets) == 6
    assert "s less in all; compiling took" in caplog.text or "no faster here (" in caplog.text
    assert all(weight.grad is None for weight in model.parameters())
