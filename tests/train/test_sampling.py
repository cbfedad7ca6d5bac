"""Sampling by keyed noise: it draws from the softmax, and nothing else has a say in it."""

import copy
from typing import Any

import pytest
import torch
from runs import llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from samestep.errors import OutOfMemoryError
from samestep.train.answers import ready_to_generate
from samestep.train.sampling import gumbel_noise, sample_completions, sampling_keys

TOKENS = 5


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = llama_folder(tmp_path_factory.mktemp("tiny"), scale=6)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model, AutoTokenizer.from_pretrained(folder)


def sampled(parts: tuple[Any, Any], number: int, **changes: Any) -> list[Any]:
    model, tokenizer = parts
    options = {"tokens": TOKENS, "temperature": 1.0, **changes}
    keys = sampling_keys(0, 0, [(9, sample) for sample in range(number)])
    with ready_to_generate(model):
        (found,) = sample_completions(
            model, tokenizer, [torch.tensor([20, 21, 22])], keys=keys, **options
        )
    return found


def test_the_noise_of_a_token_belongs_to_its_place_alone() -> None:
    keys = sampling_keys(3, 5, [(0, 0), (0, 1), (7, 0)])
    noise = gumbel_noise(keys, 2, vocabulary=50)
    assert torch.equal(noise[1:2], gumbel_noise(keys[:, 1:2], 2, vocabulary=50))
    assert torch.equal(noise[:, :20], gumbel_noise(keys, 2, vocabulary=20))
    others = [
        gumbel_noise(keys, 3, vocabulary=50),
        gumbel_noise(sampling_keys(4, 5, [(0, 0), (0, 1), (7, 0)]), 2, vocabulary=50),
        gumbel_noise(sampling_keys(3, 6, [(0, 0), (0, 1), (7, 0)]), 2, vocabulary=50),
        noise.roll(1, 0),
    ]
    assert not any((noise == other).any() for other in others)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_come_as_often_as_the_model_says(
    parts: tuple[Any, Any], temperature: float
) -> None:
    """Pearson's statistic over the ten likeliest tokens and the rest: 10 degrees of freedom."""
    number = 2000
    with torch.no_grad():
        logits = parts[0](torch.tensor([[20, 21, 22]])).logits[0, -1]
    chances = (logits / temperature).softmax(-1)
    likeliest = chances.topk(10).indices.tolist()
    first = [each.ids[0] for each in sampled(parts, number, temperature=temperature, tokens=1)]
    found = [first.count(token) for token in likeliest]
    wanted = [number * float(chances[token]) for token in likeliest]
    found.append(number - sum(found))
    wanted.append(number - sum(wanted))
    statistic = sum((one - other) ** 2 / other for one, other in zip(found, wanted, strict=True))
    assert statistic < 29.6, "chance of 1 in 1,000"  # and 2000 draws tell 0.7 from 1 by far
    assert 0.05 < max(wanted) / number < 0.95


def test_what_a_model_says_of_sampling_has_no_say(parts: tuple[Any, Any]) -> None:
    before = sampled(parts, 4)
    config = parts[0].generation_config
    config.repetition_penalty, config.temperature, config.top_k = 3.0, 0.1, 2
    config.do_sample, config.min_new_tokens = True, 5
    assert sampled(parts, 4) == before
    assert config is parts[0].generation_config


def test_a_completion_ends_with_the_token_that_ends_it(parts: tuple[Any, Any]) -> None:
    found = sampled(parts, 400, tokens=8)
    ended = [each for each in found if each.ended]
    assert 0 < len(ended) < len(found)
    assert all(each.ids[-1] == 3 and 3 not in each.ids[:-1] for each in ended)
    assert all(3 not in each.ids and len(each.ids) == 8 for each in found if not each.ended)


def test_compiled_layers_are_not_compiled_anew_for_each_length(parts: tuple[Any, Any]) -> None:
    model = copy.deepcopy(parts[0])
    compiled: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=count)
    with torch.compiler.set_stance("default"):
        assert sampled((model, parts[1]), 4) == sampled(parts, 4)
    assert not compiled
    # Ranks that were threads of this process may have left another stance.
    with torch.no_grad(), torch.compiler.set_stance("default"):
        model(torch.tensor([[20, 21, 22]]))
    assert compiled, "the layers were never compiled: there is nothing to test"


def test_what_does_not_fit_says_what_would(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parts[0], "generate", full)
    with pytest.raises(OutOfMemoryError, match=r"4 completions of 1 prompts .*--generation-batch"):
        sampled(parts, 4)
