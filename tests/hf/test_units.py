"""Heads whose rows are no plain texts: choices, pictures, sounds; each is exact or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from exact_cases import EXACT, PAD, SHAPE, _sizes, gradients, worst

from samestep.errors import ConfigError
from samestep.hf.exact_trainer import exact

ROWS = 6
PICTURE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SOUND: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "layerdrop": 0.0, "feat_extract_norm": "layer", "hidden_dropout": 0.0, "vocab_size": 7,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "num_labels": 3, "classifier_proj_size": 8, "pad_token_id": 0,
}  # fmt: skip


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Random rows of one length, whose numbers of targets are ragged where they can be."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def one(at: int) -> dict[str, Any]:
        if kind == "choices":
            ids = torch.randint(0, 256, (2 + at % 2 + 1, 5), generator=draw)[:2]
            return {"input_ids": ids, "attention_mask": ids != PAD, "labels": torch.tensor(at % 2)}
        if kind == "pictures":
            return {"pixel_values": noise(3, 8, 8), "labels": torch.tensor(at % 3)}
        if kind == "pixels":
            labels = torch.randint(0, 3, (8, 8), generator=draw)
            labels[: at + 1] = 255
            return {"pixel_values": noise(3, 8, 8), "labels": labels}
        labels = torch.randint(1, 7, (4,), generator=draw)
        labels[1 + at % 3 :] = -100
        return {
            "input_values": noise(160),
            "labels": labels if kind == "letters" else torch.tensor(at % 3),
        }

    return [one(at) for at in range(ROWS)]


def built(name: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    kind = getattr(hf, name)
    return kind(kind.config_class(**config)).double()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "multiple choice": ("BertForMultipleChoice", "choices", {**SHAPE, "hidden_dropout_prob": 0.0,
                        "attention_probs_dropout_prob": 0.0}),
    "pictures": ("ViTForImageClassification", "pictures", PICTURE),
    "sounds": ("Wav2Vec2ForSequenceClassification", "sounds", SOUND),
    "letters": ("Wav2Vec2ForCTC", "letters", {**SOUND, "ctc_loss_reduction": "mean"}),
}  # fmt: skip


def trainer_of(case: str, cut: tuple[int, int], folder: Path, **config: Any) -> Any:
    name, kind, fields = CASES[case]
    return hf.Trainer(
        built(name, {**fields, **config}),
        hf.TrainingArguments(**_sizes(*cut, folder)),
        lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]},
        rows_of(kind),
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_does_not_depend_on_the_cut(tmp_path: Path, case: str) -> None:
    (whole,) = gradients(exact(trainer_of(case, (ROWS, 1), tmp_path)))
    (cut,) = gradients(exact(trainer_of(case, (4, 2), tmp_path)))
    assert worst(whole, cut) < EXACT
    (plain,) = gradients(trainer_of(case, (4, 2), tmp_path))
    assert (worst(whole, plain) < EXACT) == (case == "pictures")  # whose loss takes the count


def test_a_sum_is_refused(tmp_path: Path) -> None:
    """CTC of wav2vec2 adds its rows up, unless it is told otherwise."""
    with pytest.raises(ConfigError, match="is no mean over"):
        exact(trainer_of("letters", (3, 2), tmp_path, ctc_loss_reduction="sum")).train()
