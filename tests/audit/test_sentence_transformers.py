"""The trainer of sentence-transformers, as it is, under the audit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from samestep.audit.check import check

WORDS = [f"w{number}" for number in range(40)]


def text(row: int, side: int) -> str:
    spots = range(3 + (5 * row + side) % 9)
    return " ".join(WORDS[(7 * spot + 3 * row + 11 * side) % 40] for spot in spots)


def factory(loss: str, folder: Path, *, scored: bool) -> Callable[..., Any]:
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    rows = {"first": [text(at, 0) for at in range(10)], "second": [text(at, 1) for at in range(10)]}
    if scored:
        rows["label"] = [(at % 5) / 5 for at in range(10)]

    def make_trainer(**sizes: int) -> Any:
        places = {word: at for at, word in enumerate([*WORDS, "?"])}
        tokenizer = Tokenizer(models.WordLevel(places, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        embedding = StaticEmbedding(tokenizer, embedding_dim=8)
        model = sentences.SentenceTransformer(modules=[embedding], device="cpu")
        args = sentences.SentenceTransformerTrainingArguments(
            output_dir=str(folder), report_to="none", use_cpu=True, **sizes
        )
        return sentences.SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(rows),
            loss=getattr(losses, loss)(model),
        )

    def sized(*, per_device_train_batch_size: int, gradient_accumulation_steps: int) -> Any:
        return make_trainer(
            per_device_train_batch_size=per_device_train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )

    return sized


@pytest.mark.filterwarnings("ignore")  # of the package's own imports
@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        ("CosineSimilarityLoss", None),
        ("MultipleNegativesRankingLoss", "batch-coupled-term"),
    ],
)
def test_losses_of_pairs_and_of_batches_are_told_apart(
    loss: str, cause: str | None, tmp_path: Path
) -> None:
    axis = check(factory(loss, tmp_path, scored=cause is None), ["micro-batch"]).axes[0]
    assert axis.verdict == ("exact" if cause is None else "inexact")
    assert axis.cause == cause


@pytest.mark.filterwarnings("ignore")  # of the package's own imports
def test_evaluations_of_losses_over_the_batch_are_coupled_too(tmp_path: Path) -> None:
    make_trainer = factory("MultipleNegativesRankingLoss", tmp_path, scored=False)
    axis = check(make_trainer, ["evaluation-batch"]).axes[0]
    assert axis.cause == "batch-coupled-term"
