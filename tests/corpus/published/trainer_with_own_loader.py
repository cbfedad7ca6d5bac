"""What sentence-transformers' trainer does (r26), with transformers alone.

reads: the trainer asks its collator for an attribute; sound otherwise. shuffles: it deals its rows
by a shuffling batch sampler of its own, and reports nothing odd; sound for full windows. contrast:
in-batch negatives of the micro-batch alone, in order.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import Trainer, TrainingArguments

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7, 6, 10)
ROWS = [{"input_ids": [(7 * spot + 3 * n) % 47 + 1 for spot in range(n)]} for n in LENGTHS]


class Collate:
    label_columns = ("labels",)

    def __call__(self, rows):
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row["input_ids"]) for row in rows], batch_first=True
        )
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 12), nn.Tanh(), nn.Linear(12, 50))

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kw):
        logits = self.body(input_ids)
        total = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (
            functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
            / total
        )
        return {"loss": loss, "logits": logits}


class Reads(Trainer):
    def get_train_dataloader(self):
        assert self.data_collator.label_columns
        return super().get_train_dataloader()


class Shuffles(Trainer):
    def get_train_dataloader(self):
        draw = torch.Generator().manual_seed(self.args.seed)
        sampler = BatchSampler(
            RandomSampler(self.train_dataset, generator=draw),
            self.args.per_device_train_batch_size,
            drop_last=False,
        )
        loader = DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


class Contrast(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        real = (inputs["input_ids"] != 0)[..., None]
        logits = model(**inputs)["logits"]
        hidden = functional.normalize((logits * real).sum(1) / real.sum(1), dim=-1)
        other = functional.normalize(logits[:, 0], dim=-1)
        loss = functional.cross_entropy(hidden @ other.T / 0.1, torch.arange(len(hidden)))
        return (loss, {"logits": hidden}) if return_outputs else loss


def made(kind, per_device_train_batch_size, gradient_accumulation_steps, **kw):
    args = TrainingArguments(
        output_dir="runs/check",
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        report_to="none",
        use_cpu=True,
        **kw,
    )
    return kind(model=Net(), args=args, train_dataset=ROWS, data_collator=Collate())


def reads(*, per_device_train_batch_size, gradient_accumulation_steps, **kw):
    return made(Reads, per_device_train_batch_size, gradient_accumulation_steps, **kw)


def shuffles(*, per_device_train_batch_size, gradient_accumulation_steps, **kw):
    return made(Shuffles, per_device_train_batch_size, gradient_accumulation_steps, **kw)


def contrast(*, per_device_train_batch_size, gradient_accumulation_steps, **kw):
    return made(Contrast, per_device_train_batch_size, gradient_accumulation_steps, **kw)


def plain(*, per_device_train_batch_size, gradient_accumulation_steps, **kw):
    return made(Trainer, per_device_train_batch_size, gradient_accumulation_steps, **kw)
