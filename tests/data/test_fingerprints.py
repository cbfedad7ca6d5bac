"""Digests that checkpoints and caches hold: what they were when the first of them was written.

A tokenizer of single characters with a fixed vocabulary reads the rows, so that no digest depends
on the release of a library.
"""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from samestep.data.examples import Example, Examples
from samestep.data.load import load_rows
from samestep.data.readers.classification import class_records, tag_records, value_records
from samestep.data.readers.latents import latent_records
from samestep.data.readers.preference import pair_records, unpaired_records
from samestep.data.readers.question_answering import answer_records
from samestep.data.readers.rollouts import rollout_records, teacher_topk_records
from samestep.data.readers.texts import mask_settings, text_records
from samestep.data.readers.vision import ImageDataset
from samestep.data.records import Records
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.train.progress import DataFingerprint

CHAT = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "one and one"},
    {"role": "assistant", "content": "two", "weight": 0.5},
    {"role": "user", "content": "sure"},
    {"role": "assistant", "content": "yes"},
]
GIVEN: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, 7, 8], "weight": 2},
    {"input_ids": [9, 10, 11]},
    {"input_ids": [1, 2, 3], "token_weights": [1, 0, 0.25]},
]


def letters() -> PreTrainedTokenizerFast:
    special = ["$", "?pad", "?mask", "?unknown"]
    vocabulary = {
        text: at for at, text in enumerate([*special, *string.printable.replace("$", "")])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="$",
        pad_token="?pad",
        mask_token="?mask",
        unk_token="?unknown",
        chat_template=CHAT,
    )


def examples(*values: dict[str, Any], **settings: Any) -> Examples:
    return tokenize_rows(load_rows(list(values)), letters(), weigh_tokens=True, **settings)


def language(*values: dict[str, Any], **settings: Any) -> Records:
    return Records(examples(*values, **settings))


def completions() -> dict[str, Records]:
    a = {"prompt": "one and ", "completion": "two", "weight": 0.5}
    b = {"prompt": "x", "completion": "three"}
    turns = {"prompt": TALK[:1], "completion": TALK[1:]}
    return {
        "token ids": language(*GIVEN),
        "token ids, cut": language(*GIVEN, max_length=3),
        "token ids, all targets": language(*GIVEN, train_on="all"),
        "prompt and completion": language(a, b),
        "prompt and completion, open end": language(a, b, append_eos=False),
        "text": language({"text": "some words"}, {"text": "more"}),
        "messages": language({"messages": TALK}, {"messages": TALK[2:]}),
        "prompt and completion turns": language(turns),
    }


def families() -> dict[str, Records]:
    tokenizer = letters()

    def rows(*values: dict[str, Any]) -> list[Any]:
        return load_rows(list(values))

    pair = {"prompt": "x ", "chosen": "good one", "rejected": "bad", "weight": 2, "margin": 0.5}
    thumbs = [
        {"prompt": "x ", "completion": "good", "label": True},
        {"prompt": "y ", "completion": "bad", "label": "false"},
        {"prompt": "y ", "completion": "", "label": 1},
    ]
    rollouts = [
        {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "reward": at, "group": "a"}
        | {"old_log_p": [-0.5, -1.0 - at]}
        for at in range(3)
    ]
    topk = rows({**GIVEN[0], "top_ids": [[7, 9], [8, 10]], "top_logps": [[-0.5, -2], [-0.25, -3]]})
    masked = text_records(rows({"text": "some words"}), tokenizer, columns=["text"])
    masked.meta.update(mask_settings(tokenizer))
    answer = {"text": ["and"], "answer_start": [4]}
    vision = Records(examples(*GIVEN), meta={"gallery": ImageDataset((), None, "5e1f")})
    margins = torch.tensor([0.5, 1.5], dtype=torch.float64)
    wide = Records(
        Examples.from_examples(
            [Example(torch.tensor([at, 2]), torch.tensor([IGNORE, 2]), row=at) for at in range(4)]
        ),
        width=2,
        fields={"margin": margins, "label": torch.tensor([True, False])},
        token_fields={"top": torch.arange(16).view(8, 2).int()},
        meta={"classes": ["a", "b"], "vocabulary": 7},
    )
    return {
        "pairs": pair_records(rows(pair, {**pair, "chosen": "fine"}), tokenizer),
        "unpaired": unpaired_records(rows(*thumbs), tokenizer),
        "rollouts": rollout_records(rows(*rollouts), tokenizer),
        "teacher top-k": teacher_topk_records(topk, tokenize_rows(topk, tokenizer)),
        "classes": class_records(
            rows({"text": "a", "label": "x"}, {"text": "b", "label": "y"}), tokenizer
        ),
        "values": value_records(
            rows({"text": "a", "label": "0.5"}, {"text": "b", "label": 2}), tokenizer
        ),
        "tags": tag_records(rows({"tokens": ["a", "b"], "tags": ["x", None]}), tokenizer),
        "answers": answer_records(
            rows({"question": "which", "context": "one and two", "answers": answer}), tokenizer
        ),
        "masked": masked,
        "texts": text_records(
            rows({"prompt": "a", "completion": "bc"}),
            tokenizer,
            columns=["prompt", "completion"],
            of_target=["completion"],
        ),
        "vision": vision,
        "fields": wide,
        "fields, some derived": wide.with_fields({"reference": margins}),
    }


DIGESTS = {
    "token ids": "0a9e581658846059d155da5b03bc65b9",
    "token ids, cut": "f240e279bed66daef0ff3a6ee0e7cbde",
    "token ids, all targets": "e0ce076810227daf2f13e5bd77729b15",
    "prompt and completion": "7836aac81701f0a0ff9495d6967da46b",
    "prompt and completion, open end": "18cba69460503baa7a6a948c8860d169",
    "text": "15a18818b7810469fb303acb69359359",
    "messages": "b1712d6de3fd47cd87d0bf0d82b3f596",
    "prompt and completion turns": "33651792f0898e9d26defb527f2471c8",
    "pairs": "42fa43f95ab34a990a7e31c852d455d6",
    "unpaired": "db5ece6a1f5bae56cf5fbdb3a183ff31",
    "rollouts": "4d302fe754cd3dd6f1f3181dbd746695",
    "teacher top-k": "a71dfcd6df37d283caaea3afcff7140d",
    "classes": "25bcaab78b38c2d7ac35402dedd306ba",
    "values": "470b6dc7b39a44f389d80bbe486a8ec0",
    "tags": "f4f831147131613429d25d07b752cc22",
    "answers": "cd07691eef5eaa0c0554d7a4df5dd395",
    "masked": "a851264261c14251d583e2218921db73",
    "texts": "8a3c2579d07279265cd4f322ce65877d",
    "vision": "b4161f00d68f82f96e65483998653be3",
    "fields": "8a5b257ab021e23f86f6ab8e6ac4b99a",
    "fields, some derived": "8a5b257ab021e23f86f6ab8e6ac4b99a",
}
"""The first half of each."""


def test_fingerprints_of_records_stay() -> None:
    found = {
        name: records.fingerprint()[:32]
        for name, records in {**completions(), **families()}.items()
    }
    assert found == DIGESTS


def test_the_fingerprint_of_files_of_latents_stays(tmp_path: Path) -> None:
    header = json.dumps({"latents": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}})
    content = np.arange(12, dtype=np.float32).tobytes()
    size = len(header).to_bytes(8, "little")
    (tmp_path / "a.safetensors").write_bytes(size + header.encode() + content)
    assert latent_records(str(tmp_path)).fingerprint()[:32] == "818398f93b8795268be3c1f39786821b"


def test_the_fingerprint_of_examples_stays() -> None:
    assert examples(*GIVEN).fingerprint()[:32] == "ccb932fb422bc821408780c63a58f022"
    assert examples(*GIVEN[:2]).fingerprint()[:32] == "90a6de81d0d3192917790b39b1fdf072"


def test_the_blocks_of_a_checkpoint_stay() -> None:
    data = DataFingerprint.of(language(*GIVEN))
    assert data.blocks == ["bd0e795954baf6fe", "3019a092df4164c5", "30dffb561771826e"]


def test_a_cache_file_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    kept = Examples.load(Path(__file__).with_name("examples-1.safetensors"))
    assert kept.fingerprint() == examples(*GIVEN).fingerprint()
    assert kept.dropped == {"no target": 1}
    kept.save(tmp_path / "now.safetensors")
    with safe_open(tmp_path / "now.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "samestep examples 1"
        assert file.metadata()["fingerprint"] == kept.fingerprint()
