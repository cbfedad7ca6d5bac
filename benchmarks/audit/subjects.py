"""Real trainers over tiny random models: each name is a subject of `samestep check`.

    samestep check benchmarks/audit/subjects.py:trl_sft

Every factory takes the two sizes by which a trainer is cut. Rows are ragged.
"""

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from heads import head
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(tempfile.mkdtemp(prefix="samestep-audit-"))
VOCABULARY = 260  # 256 bytes and four special tokens

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


@functools.cache
def tokenizer() -> Any:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258, "<|mask|>": 259}
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


@functools.cache
def saved(kind: str, **config: Any) -> str:
    """A folder with a random model and the tokenizer: some trainers load a second copy."""
    torch.manual_seed(0)
    model_class = getattr(hf, kind)
    folder = HERE / "-".join([kind, *map(str, config.values())])
    shape = GPT2 if "GPT2" in kind else LLAMA if "Bert" not in kind else SMALL
    model_class(model_class.config_class(**shape, **config)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def load(kind: str, **config: Any) -> Any:
    return getattr(hf, kind).from_pretrained(saved(kind, **config), dtype=torch.float32)


def sentences(number: int = 12, *, seed: int = 0) -> list[dict[str, Any]]:
    """Sums with an answer of ragged length, right and wrong."""
    draw = random.Random(seed)
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


def keep(*columns: str, **more: Callable[[int], Any]) -> Dataset:
    return Dataset.from_list(
        [
            {name: row[name] for name in columns} | {key: make(at) for key, make in more.items()}
            for at, row in enumerate(sentences())
        ]
    )


def tokenised(kind: str) -> Dataset:
    """Rows for a plain trainer: causal, masked or classes."""
    rows = []
    for at, row in enumerate(sentences()):
        ids = tokenizer()(row["prompt"] + row["completion"])["input_ids"]
        made: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if kind == "causal":
            start = len(tokenizer()(row["prompt"])["input_ids"])
            made["labels"] = [-100] * start + ids[start:]
        elif kind == "masked":
            draw = random.Random(at)
            gone = [not spot or draw.random() < 0.05 + 0.03 * at for spot in range(len(ids))]
            made["labels"] = [one if out else -100 for one, out in zip(ids, gone, strict=True)]
            made["input_ids"] = [259 if out else one for one, out in zip(ids, gone, strict=True)]
        else:
            made["label"] = at % 3
        rows.append(made)
    return Dataset.from_list(rows)


def arguments(config: type, sizes: dict[str, Any], **options: Any) -> Any:
    common = {"output_dir": str(HERE / "out"), "report_to": "none", "use_cpu": True}
    if config is not hf.TrainingArguments:
        common["bf16"] = False
    return config(**common, **sizes, **options)


def plain(kind: str, data: str, **config: Any) -> Callable[..., Any]:
    """`transformers.Trainer` as its documentation uses it."""
    collators: dict[str, Any] = {
        "causal": hf.DataCollatorForSeq2Seq,
        "masked": hf.DataCollatorForTokenClassification,
        "classes": hf.DataCollatorWithPadding,
    }

    def make_trainer(**sizes: Any) -> hf.Trainer:
        return hf.Trainer(
            model=load(kind, **config),
            args=arguments(hf.TrainingArguments, sizes),
            train_dataset=tokenised(data),
            data_collator=collators[data](tokenizer()),
            processing_class=tokenizer(),
        )

    return make_trainer


def of_trl(
    trainer: type,
    config: type,
    data: Callable[[], Dataset],
    *,
    kind: str = "LlamaForCausalLM",
    shape: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """A trainer of TRL with its default settings but those that are given."""

    def make_trainer(**sizes: Any) -> Any:
        return trainer(
            model=load(kind, **(shape or {})),
            args=arguments(config, sizes, **options),
            train_dataset=data(),
            processing_class=tokenizer(),
        )

    return make_trainer


THREE = {"num_labels": 3}
ROUTED = {"num_local_experts": 4, "router_aux_loss_coef": 0.01}
completions = functools.partial(keep, "prompt", "completion")
pairs = functools.partial(keep, "prompt", "chosen", "rejected")
judged = functools.partial(keep, "prompt", "completion", label=lambda at: at % 2 == 0)

llama = plain("LlamaForCausalLM", "causal")
gpt2 = plain("GPT2LMHeadModel", "causal")
llama_classes = plain("LlamaForSequenceClassification", "classes", **THREE)
gpt2_classes = plain("GPT2ForSequenceClassification", "classes", **THREE)
bert_classes = plain("BertForSequenceClassification", "classes", **THREE)
bert_masked = plain("BertForMaskedLM", "masked")
mixtral = plain("MixtralForCausalLM", "causal", **ROUTED)
mixtral_router = plain("MixtralForCausalLM", "causal", output_router_logits=True, **ROUTED)

qwen3_vl = head("Qwen3VLForConditionalGeneration")

trl_sft = of_trl(SFTTrainer, SFTConfig, completions)
trl_sft_dft = of_trl(SFTTrainer, SFTConfig, completions, loss_type="dft")
trl_sft_router = of_trl(
    SFTTrainer, SFTConfig, completions, kind="MixtralForCausalLM",
    shape={"output_router_logits": True, **ROUTED},
)  # fmt: skip
trl_dpo = of_trl(DPOTrainer, DPOConfig, pairs)
trl_dpo_sft = of_trl(DPOTrainer, DPOConfig, pairs, loss_type=["sft"])
trl_dpo_mixed = of_trl(
    DPOTrainer, DPOConfig, pairs, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]
)
trl_reward = of_trl(
    RewardTrainer, RewardConfig, pairs, kind="LlamaForSequenceClassification",
    shape={"num_labels": 1},
)  # fmt: skip
trl_kto = of_trl(KTOTrainer, KTOConfig, judged)
trl_orpo = of_trl(ORPOTrainer, ORPOConfig, pairs)
trl_cpo = of_trl(CPOTrainer, CPOConfig, pairs)

NAMES = (
    "llama", "gpt2", "llama_classes", "gpt2_classes", "bert_classes", "bert_masked", "mixtral",
    "mixtral_router", "qwen3_vl", "trl_sft", "trl_sft_dft", "trl_sft_router", "trl_dpo",
    "trl_dpo_sft", "trl_dpo_mixed", "trl_reward", "trl_kto", "trl_orpo", "trl_cpo",
)  # fmt: skip
"""Those that `run.py` audits, in the order of the table."""
