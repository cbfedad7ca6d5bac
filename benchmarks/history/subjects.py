"""Trainers that every release since transformers 4.44 has, over tiny random models and ragged rows.

    samestep check benchmarks/history/subjects.py:masked_lm

What a release calls something differently is found by looking at what it has.
"""

import functools
import inspect
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(tempfile.mkdtemp(prefix="samestep-history-"))
BEGIN, END, PADDING, MASK, VOCABULARY = 256, 257, 258, 259, 260
CLASSES = 3

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": PADDING,
}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PADDING,
}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": END,
    "pad_token_id": PADDING,
    "decoder_start_token_id": PADDING,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


@functools.cache
def tokenizer() -> Any:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<|bos|>": BEGIN, "<|eos|>": END, "<|pad|>": PADDING, "<|mask|>": MASK}
    vocabulary = {letter: index for index, letter in enumerate(letters)} | special
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
    )


def model(kind: str, *, classes: int = CLASSES) -> Any:
    """A random model, loaded from a folder: some trainers load a second copy from there."""
    return getattr(hf, kind).from_pretrained(_saved(kind, classes))


@functools.cache
def _saved(kind: str, classes: int) -> str:
    folder = HERE / f"{kind}-{classes}"
    torch.manual_seed(0)
    getattr(hf, kind)(_config(kind, classes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def _config(kind: str, classes: int) -> Any:
    config_class = getattr(hf, kind).config_class
    if kind.startswith("Llava"):
        return config_class(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**DECODER),
            image_token_index=MASK,
            pad_token_id=PADDING,
        )
    shapes = {"Bert": ENCODER, "T5": ENCODER_DECODER}
    shape = next((shapes[name] for name in shapes if kind.startswith(name)), DECODER)
    labels = {"num_labels": classes} if "Classification" in kind else {}
    return config_class(**shape, **labels)


def sentences(number: int = 12) -> list[dict[str, Any]]:
    """Sums with an answer of ragged length, right and wrong."""
    draw = random.Random(0)
    rows = []
    for _ in range(number):
        a, b = draw.randint(1, 999), draw.randint(1, 99)
        tail = " Yes." * draw.randint(0, 5)
        rows.append(
            {
                "prompt": f"{a} + {b}?",
                "completion": f" {a + b}.{tail}",
                "chosen": f" {a + b}.{tail}",
                "rejected": f" {a - b}" + "!" * draw.randint(0, 9),
            }
        )
    return rows


@functools.cache
def tokenised(task: str) -> Dataset:
    """Rows for a plain trainer."""
    rows = []
    for at, row in enumerate(sentences()):
        draw = random.Random(at)
        prompt, whole = (tokenizer()(text)["input_ids"] for text in (row["prompt"], _text(row)))
        made: dict[str, Any] = {"input_ids": whole, "attention_mask": [1] * len(whole)}
        if task == "causal":
            made["labels"] = [-100] * len(prompt) + whole[len(prompt) :]
        elif task == "seq2seq":
            made |= {"input_ids": prompt, "attention_mask": [1] * len(prompt)}
            made["labels"] = whole[len(prompt) :]
        elif task == "masked":
            gone = [not spot or draw.random() < 0.05 + 0.03 * at for spot in range(len(whole))]
            made["labels"] = [one if out else -100 for one, out in zip(whole, gone, strict=True)]
            made["input_ids"] = [MASK if out else one for one, out in zip(whole, gone, strict=True)]
        elif task == "tokens":
            made["labels"] = [-100] * len(prompt) + [
                draw.randrange(CLASSES) for _ in whole[len(prompt) :]
            ]
        else:
            made["label"] = at % CLASSES
        rows.append(made)
    return Dataset.from_list(rows)


def _text(row: dict[str, Any]) -> str:
    return f"{row['prompt']}{row['completion']}"


def _text_of_rows(row: dict[str, Any]) -> Any:
    """The text of a row, or of each of several: TRL asked in both ways."""
    if isinstance(row["text"], list):
        return row["text"]
    return [row["text"]]


def _named(kind: type, **options: Any) -> dict[str, Any]:
    """Those options that a class or a config takes."""
    known = inspect.signature(kind).parameters
    return {name: value for name, value in options.items() if name in known}


def _reads(trainer: type) -> dict[str, Any]:
    """The tokenizer, by the name under which a trainer takes it."""
    parameters = inspect.signature(trainer).parameters
    name = "processing_class" if "processing_class" in parameters else "tokenizer"
    return {name: tokenizer()}


def _arguments(config: type, sizes: dict[str, Any], **options: Any) -> Any:
    common: dict[str, Any] = {"output_dir": str(HERE / "out"), "report_to": "none"}
    common |= {"use_cpu": True, "bf16": False}
    return config(**common, **sizes, **options)


def plain(
    kind: str, task: str, *, trainer: str = "Trainer", arguments: str = "TrainingArguments"
) -> Callable[..., Any]:
    """A trainer of transformers as its documentation uses it."""
    collator = {
        "causal": hf.DataCollatorForSeq2Seq,
        "seq2seq": hf.DataCollatorForSeq2Seq,
        "masked": hf.DataCollatorForTokenClassification,
        "tokens": hf.DataCollatorForTokenClassification,
        "classes": hf.DataCollatorWithPadding,
    }[task]

    held = functools.cache(lambda: model(kind))  # the auditor restores it before every run

    def make_trainer(**sizes: Any) -> Any:
        return getattr(hf, trainer)(
            model=held(),
            args=_arguments(getattr(hf, arguments), sizes),
            train_dataset=tokenised(task),
            data_collator=collator(tokenizer()),
            **_reads(hf.Trainer),
        )

    return make_trainer


def sft_completions(**sizes: Any) -> Any:
    """TRL's SFT on the completions alone."""
    options: dict[str, Any] = {}
    if "completion_only_loss" in inspect.signature(trl.SFTConfig).parameters:
        data = Dataset.from_list(
            [{name: row[name] for name in ("prompt", "completion")} for row in sentences()]
        )
    else:  # a collator masks what stands before the answer
        data = Dataset.from_list([{"text": _text(row)} for row in sentences()])
        options["data_collator"] = trl.DataCollatorForCompletionOnlyLM(
            tokenizer()("?")["input_ids"], tokenizer=tokenizer()
        )
        options["formatting_func"] = _text_of_rows
    return trl.SFTTrainer(
        model=model("LlamaForCausalLM"),
        args=_arguments(trl.SFTConfig, sizes),
        train_dataset=data,
        **options,
        **_reads(trl.SFTTrainer),
    )


def sft_packed(**sizes: Any) -> Any:
    """TRL's SFT on packed rows."""
    length = _named(trl.SFTConfig, max_length=64, max_seq_length=64)
    field = _named(trl.SFTConfig, dataset_text_field="text")
    return trl.SFTTrainer(
        model=model("LlamaForCausalLM"),
        args=_arguments(trl.SFTConfig, sizes, packing=True, **length, **field),
        train_dataset=Dataset.from_list([{"text": _text(row)} for row in sentences(32)]),
        **_reads(trl.SFTTrainer),
    )


def dpo(**sizes: Any) -> Any:
    """TRL's DPO."""
    return trl.DPOTrainer(
        model=model("LlamaForCausalLM"),
        args=_arguments(trl.DPOConfig, sizes),
        train_dataset=_pairs(),
        **_reads(trl.DPOTrainer),
    )


def reward(**sizes: Any) -> Any:
    """TRL's reward model."""
    classifier = model("LlamaForSequenceClassification", classes=1)
    data = _pairs()
    if "tokenizer" in inspect.signature(trl.RewardTrainer).parameters:
        data = data.map(_tokenised_pair, remove_columns=data.column_names)
    return trl.RewardTrainer(
        model=classifier,
        args=_arguments(trl.RewardConfig, sizes, **_named(trl.RewardConfig, max_length=128)),
        train_dataset=data,
        **_reads(trl.RewardTrainer),
    )


def _pairs() -> Dataset:
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{name: row[name] for name in names} for row in sentences()])


def _tokenised_pair(row: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for name in ("chosen", "rejected"):
        found = tokenizer()(row["prompt"] + row[name])
        made |= {f"{key}_{name}": found[key] for key in ("input_ids", "attention_mask")}
    return made


causal_lm = plain("LlamaForCausalLM", "causal")
masked_lm = plain("BertForMaskedLM", "masked")
classification = plain("BertForSequenceClassification", "classes")
decoder_classification = plain("LlamaForSequenceClassification", "classes")
token_classification = plain("BertForTokenClassification", "tokens")
seq2seq = plain(
    "T5ForConditionalGeneration",
    "seq2seq",
    trainer="Seq2SeqTrainer",
    arguments="Seq2SeqTrainingArguments",
)
vision_language = plain("LlavaForConditionalGeneration", "causal")
