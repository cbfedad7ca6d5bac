"""Own probe after hiyouga/LlamaFactory#7318 (r14): rotary positions that only shift.

NeoX, Llama: padded on the left with a mask and no position ids, positions count the padding; rotary
attention sees differences only, so the step is the same up to the rounding of cos and sin.
"""

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


class NeoX:
    def model(self):
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))

    def examples(self):
        return [(torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS]

    def collate(self, rows):
        width = max(map(len, rows))
        left = [width - len(row) for row in rows]
        return {
            key: torch.stack(
                [
                    functional.pad(one, (before, 0), value=fill)
                    for one, before in zip(ones, left, strict=False)
                ]
            )
            for key, ones, fill in (
                ("input_ids", rows, 0),
                ("labels", rows, -100),
                ("attention_mask", [row * 0 + 1 for row in rows], 0),
            )
        }

    def step(self, model, micros):
        labels = [micro["labels"].clone() for micro in micros]
        for one, micro in zip(labels, micros, strict=False):
            one[torch.arange(len(one)), micro["attention_mask"].argmax(1)] = -100
        total = sum((one[:, 1:] != -100).sum() for one in labels)
        for micro, one in zip(micros, labels, strict=False):
            logits = model(micro["input_ids"], attention_mask=micro["attention_mask"]).logits
            (
                functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), one[:, 1:].flatten(), reduction="sum"
                )
                / total
            ).backward()


class Llama(NeoX):
    def model(self):
        return LlamaForCausalLM(LlamaConfig(**SMALL))
