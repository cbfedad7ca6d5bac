"""Trainers that generate what they train on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from samestep.audit.check import check

trl = pytest.importorskip("trl")

WORDS = ["<pad>", "<end>", "<unknown>", *(f"w{at}" for at in range(30))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token=WORDS[2])
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape, **heads, **ends))


def nothing_is_right(completions: list[str], **_: Any) -> list[float]:
    return [0.0 for _ in completions]


def different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(one.split()))) for one in completions]


def factory(
    folder: Path, kind: str = "GRPO", reward: Callable[..., Any] = different_words, **options: Any
) -> Callable[..., Any]:
    prompts = [" ".join(f"w{(at * 7 + word) % 30}" for word in range(2 + at)) for at in range(6)]

    def make_trainer(**sizes: Any) -> Any:
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(folder),
            num_generations=2,
            max_completion_length=7,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **options,
            **sizes,
        )
        return getattr(trl, f"{kind}Trainer")(
            model=model(),
            args=arguments,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer(),
        )

    return make_trainer


def verdicts(make_trainer: Callable[..., Any], *axes: str) -> dict[str, str]:
    report = check(make_trainer, axes)
    return {axis.name: axis.cause or axis.verdict for axis in report.axes}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_losses_with_one_count_are_exact(tmp_path: Path, loss: str) -> None:
    found = verdicts(factory(tmp_path, loss_type=loss), "micro-batch", "ranks", "evaluation-batch")
    assert found == {"micro-batch": "exact", "ranks": "exact", "evaluation-batch": "skipped"}


def test_a_loss_that_averages_twice_is_named(tmp_path: Path) -> None:
    found = verdicts(factory(tmp_path, loss_type="bnpo"), "micro-batch", "ranks")
    assert found == {"micro-batch": "mean-of-means", "ranks": "rank-local-count"}


def test_rollouts_that_are_all_as_bad_still_have_a_gradient(tmp_path: Path) -> None:
    make_trainer = factory(tmp_path, reward=nothing_is_right, loss_type="bnpo")
    assert verdicts(make_trainer, "micro-batch") == {"micro-batch": "mean-of-means"}


def test_one_is_left_out_of_the_baseline(tmp_path: Path) -> None:
    found = verdicts(factory(tmp_path, "RLOO", beta=0.0), "micro-batch", "reported")
    assert found == {"micro-batch": "exact", "reported": "metric-mean-of-means"}
