"""Embeddings, masked and translated texts: plain values of the whole batch, under every split."""

from typing import Any

import pytest
import torch
from cases import V, gradients, worst
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import samestep
from objectives import SPLITS, check_all_splits, cut, ragged_records
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.objectives.classification import Embedding
from samestep.objectives.language import SEQ2SEQ_COUNTERS, MaskedLM, Seq2Seq
from samestep.objectives.units import EXAMPLE_COUNTERS, LABELLED_TOKEN_COUNTERS
from samestep.train.recipes.language import MaskedLMRecipe, Seq2SeqRecipe
from samestep.train.settings.language import MaskedLMSettings, Seq2SeqSettings

N = 8
NEEDED = {"model": "m", "data": "d", "out": "o"}
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def llama() -> LlamaConfig:
    return LlamaConfig(**SHAPE, num_attention_heads=4)


def vectors(model: Any, records: Records, pooling: str) -> Tensor:
    """One vector a sequence, each run by itself [sequences, width]."""
    model.set_attn_implementation("sdpa")
    states = [
        model(input_ids=one.input_ids[None]).last_hidden_state[0] for one in records.sequences
    ]
    at = {"last": lambda s: s[-1], "first": lambda s: s[0], "mean": lambda s: s.mean(0)}[pooling]
    return torch.stack([at(one) for one in states])


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize(
    ("pooling", "symmetric"), [("mean", False), ("last", True), ("first", False)]
)
def test_the_whole_batch_are_the_negatives(width: int, pooling: Any, symmetric: bool) -> None:
    torch.manual_seed(0)
    # The first token of a decoder sees nothing but itself.
    model = bert().bert if pooling == "first" else LlamaModel(llama())
    model = model.double().train()
    records = ragged_records(N, width=width, weighted=True)
    weights = records.sequences.weights[::width]

    def truth(model: Any) -> Tensor:
        sides = vectors(model, records, pooling).view(N, width, -1)
        candidates = [sides[:, 1], sides[:, 2]] if width == 3 else [sides[:, 1]]
        similar = cosine_similarity(sides[:, None, 0], torch.cat(candidates)[None], dim=-1)
        losses = cross_entropy(10 * similar, torch.arange(N), reduction="none")
        if symmetric:
            back = cosine_similarity(sides[:, None, 1], sides[None, :, 0], dim=-1)
            losses = (losses + cross_entropy(10 * back, torch.arange(N), reduction="none")) / 2
        return (weights * losses).sum() / weights.sum()

    loss = Embedding(width=width, pooling=pooling, scale=10.0, symmetric=symmetric)
    terms = check_all_splits(model, records, Objective(TwoPass(loss), EXAMPLE_COUNTERS), truth)
    assert 0 <= terms["accuracy"] <= 1


def test_negatives_of_each_micro_batch_alone_are_caught() -> None:
    torch.manual_seed(0)
    model = LlamaModel(llama()).double().train()
    records = ragged_records(N, width=2)
    loss = Embedding(scale=10.0)

    def local(model: Any, micro: Any) -> samestep.Term:
        term = loss(model, micro)["contrastive"]
        return samestep.Term(term.value(term.part) * len(term.part), "example")

    found = []
    for loss_fn in (TwoPass(loss), local):
        micros = cut(model, records, [3, 2], "none")
        samestep.backward(model, micros, loss_fn, counters=EXAMPLE_COUNTERS)
        found.append(gradients(model))
    assert worst(found[1], found[0]) > 1e-2


def bert() -> Any:
    torch.manual_seed(0)
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(**SHAPE, num_attention_heads=4, **drop)).double().train()
    for name, weight in model.named_parameters():
        if name.endswith("key.bias"):  # inside a softmax: its gradient is only rounding
            weight.requires_grad_(False)
    return model


def masked_records() -> Records:
    plain = ragged_records(N)
    special = torch.zeros(len(plain.sequences.ids), dtype=torch.int64)
    special[plain.sequences.offsets[:-1]] = 1
    meta = {"mask_id": 1, "vocabulary": V}
    return Records(plain.sequences, token_fields={"special": special}, meta=meta)


@pytest.mark.parametrize("seed", [0, 1])
def test_masked_tokens_are_transformers_and_belong_to_the_examples(seed: int) -> None:
    model, records = bert(), masked_records()
    recipe = MaskedLMRecipe(MaskedLMSettings(**NEEDED, mask_share=0.3))

    def batch(indices: list[int], padding: Any) -> dict[str, Any]:
        return recipe.collate(records, indices, padding=padding, pad_id=0, key=(seed, 5))

    model.set_attn_implementation("sdpa")
    whole = batch(list(range(N)), "right")
    inputs = samestep.model_inputs(whole)
    wanted_loss = model(**inputs, labels=whole["fields"]["classes"]).loss
    wanted_loss.backward()
    wanted = gradients(model)
    for sizes in ([N], [1] * N, [3, 1, 4]):
        cuts = torch.arange(N).flip(0).split(sizes)
        micros = [batch(part.tolist(), "left") for part in cuts]
        loss, _ = samestep.backward(model, micros, MaskedLM(), counters=LABELLED_TOKEN_COUNTERS)
        assert loss == pytest.approx(wanted_loss.item(), rel=1e-12)
        assert worst(gradients(model), wanted) < 1e-12


def test_masks_change_from_step_to_step_and_never_hide_special_tokens() -> None:
    recipe, records = MaskedLMRecipe(MaskedLMSettings(**NEEDED, mask_share=0.5)), masked_records()
    micros = [
        recipe.collate(records, range(N), padding="right", pad_id=0, key=(0, step))
        for step in (0, 0, 1)
    ]
    classes = [micro["fields"]["classes"] for micro in micros]
    assert torch.equal(classes[0], classes[1])
    assert not torch.equal(classes[0], classes[2])
    assert bool((classes[0][:, 0] == -100).all())
    chosen = classes[0] != -100
    share = chosen.sum() / len(records.sequences.ids)
    assert 0.35 < share < 0.65
    assert bool((micros[0]["input_ids"][chosen] != classes[0][chosen]).any())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_translation_is_transformers(smoothing: float) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double().train()
    records = ragged_records(N, width=2)
    recipe = Seq2SeqRecipe(Seq2SeqSettings(**NEEDED))

    def batch(indices: Any) -> dict[str, Any]:
        return recipe.collate(records, indices, padding="right", pad_id=0, key=(0, 0))

    whole = batch(range(N))
    targets = whole["fields"]["targets"]
    outputs = model(**samestep.model_inputs(whole), labels=targets)
    wanted_loss = cross_entropy(
        outputs.logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing
    )
    if not smoothing:
        assert wanted_loss.item() == pytest.approx(outputs.loss.item(), rel=1e-6)
    wanted_loss.backward()
    wanted = gradients(model)
    for sizes, _ in SPLITS:
        micros, at = [], 0
        while at < N:
            size = sizes[len(micros) % len(sizes)]
            micros.append(batch(range(at, min(at + size, N))))
            at += size
        loss, terms = samestep.backward(
            model, micros, Seq2Seq(smoothing), counters=SEQ2SEQ_COUNTERS
        )
        assert loss == pytest.approx(wanted_loss.item(), rel=1e-12)
        assert worst(gradients(model), wanted) < 1e-12
        assert len(terms) == 2 + bool(smoothing)
