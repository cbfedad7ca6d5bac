"""Trainers of what is installed, over tiny random models and ragged rows: factories for a probe."""

import functools
import inspect
import random
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import transformers as hf

from samestep.doctor.heads import head

BYTES, BEGIN, END, PADDING = 256, 256, 257, 258

causal_lm = functools.partial(head, "LlamaForCausalLM")
masked_lm = functools.partial(head, "BertForMaskedLM")
classification = functools.partial(head, "BertForSequenceClassification")


@functools.cache
def tokenizer() -> Any:
    """One token a byte; no file and no hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<bos>": BEGIN, "<eos>": END, "<pad>": PADDING}
    vocabulary = {letter: index for index, letter in enumerate(letters)} | special
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@functools.cache
def decoder_folder() -> str:
    """A random decoder and its tokenizer in a folder: some trainers load a second copy."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=BYTES + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PADDING,
    )
    folder = tempfile.mkdtemp(prefix="samestep-doctor-")
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(*columns: str) -> Any:
    """Prompts with answers of ragged length, right and wrong."""
    from datasets import Dataset

    draw = random.Random(0)
    rows = []
    for _ in range(8):
        a, b = draw.randint(1, 999), draw.randint(1, 99)
        answer = f" {a + b}." + " Yes." * draw.randint(0, 5)
        wrong = f" {a - b}" + "!" * draw.randint(0, 9)
        rows.append(
            {"prompt": f"{a}+{b}?", "completion": answer, "chosen": answer, "rejected": wrong}
        )
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def sft() -> Callable[..., Any]:
    """TRL's SFTTrainer on prompts with completions."""
    return _of_trl("SFT", "prompt", "completion")


def dpo() -> Callable[..., Any]:
    """TRL's DPOTrainer on pairs."""
    return _of_trl("DPO", "prompt", "chosen", "rejected")


def _of_trl(kind: str, *columns: str) -> Callable[..., Any]:
    library = import_module("trl")
    trainer, config = getattr(library, f"{kind}Trainer"), getattr(library, f"{kind}Config")
    known = inspect.signature(trainer).parameters
    name = "processing_class" if "processing_class" in known else "tokenizer"

    def make_trainer(*, per_device_train_batch_size: int, gradient_accumulation_steps: int) -> Any:
        return trainer(
            model=hf.LlamaForCausalLM.from_pretrained(decoder_folder()),
            args=config(
                output_dir=tempfile.gettempdir(),
                per_device_train_batch_size=per_device_train_batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=texts(*columns),
            **{name: tokenizer()},
        )

    return make_trainer
