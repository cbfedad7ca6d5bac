"""Trainers of `transformers` and TRL over tiny random models, for what makes their step exact."""

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from samestep.audit.adapters.instrument import force_float64

V, PAD = 260, 258

EXACT = 1e-12
"""How far a weight's gradient may be off in float64, relatively: the contract of the step."""

SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": PAD,
}
ROUTED: dict[str, Any] = {
    "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3,
}  # fmt: skip
BALANCED = {**ROUTED, "output_router_logits": True}
"""Mixtral's configuration, with its router loss."""

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "dropout_rate": 0.0, "pad_token_id": PAD, "eos_token_id": 257, "decoder_start_token_id": PAD,
}  # fmt: skip


@functools.cache
def tokenizer() -> Any:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<bos>": 256, "<eos>": 257, "<pad>": 258, "<mask>": 259}
    vocabulary = {letter: index for index, letter in enumerate(letters)} | special
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **names)


def model_of(name: str, **config: Any) -> Any:
    """A random model in float64."""
    torch.manual_seed(0)
    kind = getattr(hf, name)
    shape = T5 if "T5" in name else SHAPE | (BERT if "Bert" in name else {})
    return kind(kind.config_class(**(shape | config))).double()


def token_rows(labels: str, number: int = 8) -> list[dict[str, Any]]:
    """Ragged rows whose numbers of targets are ragged too.

    Args:
        labels: ``next`` (some tokens), ``tokens`` (classes of some), ``row`` (a class), ``value``
            (a number), or ``answer`` (a span).
        number: Of rows.
    """
    draw = random.Random(0)
    rows = []
    for at in range(number):
        ids = [draw.randrange(256) for _ in range(3 + 5 * at % 17)]
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        taken = [draw.random() < 0.15 + 0.1 * at or not spot for spot in range(len(ids))]
        if labels == "next":
            start = draw.randrange(len(ids) - 1)
            row["labels"] = [-100] * start + ids[start:]
        elif labels == "tokens":
            row["labels"] = [one % 3 if out else -100 for one, out in zip(ids, taken, strict=True)]
        elif labels == "row":
            row["labels"] = at % 3
        elif labels == "value":
            row["labels"] = 0.1 * at * at
        else:
            row |= {"start_positions": at % 2, "end_positions": 1 + at % 2}
        rows.append(row)
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right."""
    filling = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        batch[name] = (
            torch.nn.utils.rnn.pad_sequence(values, True, padding_value=filling[name])
            if values[0].dim()
            else torch.stack(values)
        )
    if "start_positions" in batch:  # the place of an answer is sought in the padding too
        for name in ("input_ids", "attention_mask"):
            short = 24 - batch[name].shape[1]
            batch[name] = torch.nn.functional.pad(batch[name], (0, short), value=filling[name])
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def text_rows(*columns: str) -> Dataset:
    """Prompts with ragged answers, right and wrong."""
    draw = random.Random(0)
    rows = []
    for _ in range(8):
        a, b = draw.randint(1, 999), draw.randint(1, 99)
        rows.append(
            {
                "prompt": f"{a}+{b}?",
                "completion": f" {a + b}." + " Yes." * draw.randint(0, 4),
                "chosen": f" {a + b}." + " Yes." * draw.randint(0, 4),
                "rejected": f" {a - b}" + "!" * draw.randint(0, 9),
            }
        )
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


Factory = Callable[..., Any]


def plain(
    name: str,
    labels: str,
    *,
    trainer: type = hf.Trainer,
    arguments: dict[str, Any] | None = None,
    number: int = 8,
    **config: Any,
) -> Factory:
    """`transformers.Trainer` as its documentation uses it."""

    def make(batch_size: int, accumulation: int, folder: Any, **more: Any) -> Any:
        options = {**_sizes(batch_size, accumulation, folder), **(arguments or {}), **more}
        rows = token_rows(labels, number)
        return trainer(
            model=model_of(name, **config),
            args=hf.TrainingArguments(**options),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
        )

    return make


def of_trl(
    trainer: type,
    config: type,
    *columns: str,
    model: str = "LlamaForCausalLM",
    shape: dict[str, Any] | None = None,
) -> Any:
    """A factory of a trainer of TRL, with options of its configuration."""

    def with_options(**settings: Any) -> Factory:
        def make(batch_size: int, accumulation: int, folder: Any, **more: Any) -> Any:
            options = {**_sizes(batch_size, accumulation, folder), **settings, **more}
            labels = {"num_labels": 1} if "Classification" in model else {}
            folder_of_model = folder / "model"
            model_of(model, **labels, **(shape or {})).save_pretrained(folder_of_model)
            tokenizer().save_pretrained(folder_of_model)
            kind = getattr(hf, model)
            return trainer(
                model=kind.from_pretrained(folder_of_model, dtype=torch.float64),
                args=config(bf16=False, **options),
                train_dataset=text_rows(*columns),
                eval_dataset=text_rows(*columns),
                processing_class=tokenizer(),
            )

        return make

    return with_options


def _sizes(batch_size: int, accumulation: int, folder: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "report_to": "none",
        "use_cpu": True,
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }


sft = of_trl(SFTTrainer, SFTConfig, "prompt", "completion")
dpo = of_trl(DPOTrainer, DPOConfig, "prompt", "chosen", "rejected")
reward = of_trl(
    RewardTrainer, RewardConfig, "prompt", "chosen", "rejected",
    model="LlamaForSequenceClassification",
)  # fmt: skip


class RecordsGradient(hf.TrainerCallback):
    """Keeps the gradient of every update, by the name of the weight."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        weights = parts["model"].named_parameters()
        self.updates.append({n: w.grad.clone() for n, w in weights if w.grad is not None})


def gradients(trainer: Any) -> list[dict[str, Tensor]]:
    """The gradient of each update of a whole training, computed in float64 throughout."""
    recorder = RecordsGradient()
    trainer.add_callback(recorder)
    with force_float64():  # rotations, losses and TRL's fused head are in float32 otherwise
        trainer.train()
    return recorder.updates


def worst(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest relative difference of a weight's gradient, each weight by itself."""
    assert first.keys() == second.keys()
    found = []
    for name, one in first.items():
        size = max(float(one.norm()), float(second[name].norm()))
        found.append(float((one - second[name]).norm()) / size if size > 1e-14 else 0.0)
    return max(found)
