"""Write the configs and the tokenizer of the reduced models that the studies train from scratch.

    python studies/make_models.py

The shapes are those of Llama 3.2 (grouped-query attention, llama3 rotary scaling, tied embeddings)
and Qwen2 (biases on queries, keys and values), reduced until a step takes less than a second on
one core. The tokenizer is byte-level BPE, trained on the bundled rows.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

HERE = Path(__file__).resolve().parent
ROWS = HERE.parent / "data" / "gsm_train.jsonl"
VOCABULARY = 1024


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the prompts and completions of the bundled rows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    lines = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    core.train_from_iterator(
        (row["prompt"] + row["completion"] for row in lines),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|pad|>", "<|end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")


def main() -> None:
    """Write both folders."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    configs: dict[str, PretrainedConfig] = {
        "llama-3.2-style": LlamaConfig(**shape, rope_parameters=llama3),
        "qwen2-style": Qwen2Config(**shape),
    }
    for name, config in configs.items():
        config.save_pretrained(HERE / "models" / name)
        tokenizer().save_pretrained(HERE / "models" / name)


if __name__ == "__main__":
    main()
