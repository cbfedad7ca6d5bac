"""Every trainable head of `transformers`, small, as a factory of trainers.

samestep check benchmarks/audit/heads.py:LlamaForCausalLM
"""

from collections.abc import Callable
from typing import Any

from samestep.doctor.heads import classes_of, head, tasks

TASKS = tasks()


def __getattr__(name: str) -> Callable[..., Any]:
    if any(name in classes_of(task) for task in TASKS):
        return head(name)
    raise AttributeError(name)
