"""Refusals: trainers whose step no factor for each micro-batch makes exact, and why."""

import ast
import inspect
import textwrap
from collections.abc import Sized
from typing import Any

from torch import nn

from samestep.errors import ConfigError
from samestep.hf.routers import FUNCTION, balance_function
from samestep.hf.units import base_model, library_classes, own_methods

COMPLETE_ALREADY = ("GRPOTrainer", "RLOOTrainer")
"""Trainers that divide by the same number however a window is cut: they are left alone."""

SERVED = ("SFTTrainer", "DPOTrainer", "RewardTrainer", *COMPLETE_ALREADY)

_STEPS = ("gradient_accumulation_steps", "current_gradient_accumulation_steps")
_SORTING = ("aot", "aot_unpaired")
_HERE = "`samestep train` (docs/objectives.md)"


def is_complete(trainer: Any) -> bool:
    """Whether a trainer's own step is exact, so that nothing is to be done."""
    return any(name in COMPLETE_ALREADY for name in library_classes(trainer))


def refuse_inexact(trainer: Any, *, two_pass: bool = False, key_dropout: bool = False) -> None:
    """Refuse a trainer that no factor makes exact.

    Args:
        trainer: The trainer.
        two_pass: Whether a router loss is to be taken over the window.
        key_dropout: Whether dropout is to draw by the row.

    Raises:
        ConfigError: Every reason, each with what to do instead.
    """
    found = [*_of_setup(trainer), *_of_library(trainer), *_of_overrides(trainer)]
    found += [*_of_repeats(trainer), *_of_routers(trainer, two_pass=two_pass)]
    found += _of_dropout(trainer) if key_dropout else []
    if not is_complete(trainer):
        found += _of_model(trainer)
    if found:
        kind = next(
            each.__name__ for each in type(trainer).__mro__ if "samestep" not in each.__module__
        )
        lines = "\n".join(f"- {each}" for each in found)
        raise ConfigError(f"the step of {kind} cannot be made exact:\n{lines}")


def _of_setup(trainer: Any) -> list[str]:
    found = []
    if trainer.args.n_gpu > 1:
        found.append(
            f"DataParallel over {trainer.args.n_gpu} GPUs averages the replicas' means: start one "
            "process for each GPU with torchrun, or show one with CUDA_VISIBLE_DEVICES"
        )
    if trainer.is_deepspeed_enabled:
        found.append("DeepSpeed scales losses itself, and is not tested: use DDP")
    config = getattr(trainer.accelerator, "parallelism_config", None)
    for name, words in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        if config is not None and getattr(config, f"{name}_enabled", False):
            found.append(f"{words} parallelism splits what is counted, and is not tested: use DDP")
    return found


def _of_library(trainer: Any) -> list[str]:
    names = library_classes(trainer)
    if not names or names == ["_BaseTrainer"]:
        return []
    served = names[0]  # one that derives from another has a loss of its own, as GKD from SFT
    if served not in SERVED:
        return [_of_unserved(served)]
    found = []
    if getattr(trainer, "_entropy_bonus_enabled", False):
        found.append("the entropy bonus is averaged over each micro-batch: set entropy_coef=0.0")
    kinds = trainer.args.loss_type if hasattr(trainer.args, "loss_type") else []
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if served == "GRPOTrainer" and "bnpo" in kinds:
        found.append(
            "loss_type='bnpo' divides by each micro-batch's own tokens, by definition: use 'dapo', "
            "which divides by those of the whole batch, or 'grpo'"
        )
    if served == "DPOTrainer":
        if getattr(trainer.args, "rpo_alpha", None) is not None:
            found.append(
                f"rpo_alpha={trainer.args.rpo_alpha:g} adds a mean over tokens to one over pairs, "
                f"and one factor cannot scale both: set rpo_alpha=None, or use {_HERE}"
            )
        if "sft" in kinds and len(kinds) > 1:
            found.append(
                f"loss_type={kinds}: 'sft' is a mean over tokens, the others over pairs, and one "
                f"factor cannot scale both: leave 'sft' out, or use {_HERE}"
            )
        found += [
            f"loss_type={kind!r} sorts the pairs of a micro-batch: use 'sigmoid'"
            for kind in sorted({*kinds} & {*_SORTING})
        ]
    return found


def _of_repeats(trainer: Any) -> list[str]:
    """Pairs that a rank would count twice to be as long as the others.

    TRL gathers what it logs of each pair, so no rank may leave some of its own out.
    """
    ranks, size = trainer.accelerator.num_processes, trainer.args.per_device_train_batch_size
    paired = {"DPOTrainer", "RewardTrainer"} & {*library_classes(trainer)}
    if ranks == 1 or not paired or trainer.args.dataloader_drop_last:
        return []
    if not isinstance(trainer.train_dataset, Sized):
        return []  # known when the last micro-batch comes
    left = len(trainer.train_dataset) % (ranks * size)
    if left % size == 0:
        return []
    return [
        f"{len(trainer.train_dataset)} pairs in micro-batches of {size} on {ranks} ranks: in an "
        f"epoch's last one a rank repeats {size - left % size} of its pairs, which would count "
        f"twice: set dataloader_drop_last=True, or take a number of pairs that {size} divides"
    ]


def _of_unserved(name: str) -> str:
    if "ORPO" in name or "CPO" in name:
        return (
            f"{name} adds a mean over tokens to a mean over pairs in one number, and one factor "
            f"cannot scale both: use {_HERE}, objective orpo or cpo"
        )
    if "KTO" in name:
        return (
            f"{name} subtracts a divergence that is averaged over each micro-batch: use {_HERE}, "
            "objective kto"
        )
    return f"{name} is not known to be a mean over one unit: {', '.join(SERVED)} are served"


def _of_model(trainer: Any) -> list[str]:
    found = []
    norms = [
        n
        for n, m in trainer.model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    if norms:
        found.append(
            f"batch norm ({norms[0]}, {len(norms)} in all) uses the statistics of each "
            "micro-batch: use a model with layer norm or group norm"
        )
    model = base_model(trainer)
    if trainer.can_return_loss and not library_classes(trainer):
        found.append(
            f"{type(model).__name__} contrasts each row with the others of its micro-batch: use "
            f"{_HERE}, objective embedding, which gathers them"
        )
    config = getattr(model, "config", None)
    if "ForPreTraining" in type(model).__name__ and hasattr(config, "type_vocab_size"):
        found.append(
            f"{type(model).__name__} may add a mean over rows to one over tokens: use the masked "
            "language model alone"
        )
    peft = getattr(trainer.model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        found.append("prompt learning adds virtual tokens that cannot be counted: use LoRA")
    return found


def _of_routers(trainer: Any, *, two_pass: bool) -> list[str]:
    model, names = base_model(trainer), library_classes(trainer)
    if names:
        balances, off = getattr(trainer, "aux_loss_enabled", False), "router_aux_loss_coef=0.0"
    else:
        balances = getattr(getattr(model, "config", None), "output_router_logits", False)
        off = "model.config.output_router_logits = False"
    if not balances:
        return ["two_pass=True: the trainer has no router loss, so leave it out"] * two_pass
    if names and "SFTTrainer" not in names:
        return [
            "the router loss couples the batch and is added to a mean in another unit: set "
            f"{off}, or use {_HERE}"
        ]
    if not two_pass:
        return [
            "the router loss couples the batch: take it over the whole window, with one more "
            f"forward, by exact(trainer, two_pass=True); or set {off}, or use {_HERE}"
        ]
    found = []
    if balance_function(model) is None:
        found.append(
            f"two_pass=True serves models that balance by {FUNCTION} as Mixtral does, and "
            f"{type(model).__name__} does not: set {off}"
        )
    if trainer.is_fsdp_enabled:
        found.append("two_pass=True is not tested with FSDP: use DDP")
    if getattr(trainer.args, "torch_compile", False):
        found.append("two_pass=True reads the routers as the model runs: set torch_compile=False")
    return found


def _of_dropout(trainer: Any) -> list[str]:
    model, found = base_model(trainer), []
    if is_complete(trainer):
        found.append(
            f"key_dropout=True: {library_classes(trainer)[0]} is left alone, its dropout too: set "
            "the model's dropout to 0"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found.append(
            f"key_dropout=True: {type(model).__name__} holds two sequences a row, and which of the "
            "two a dropout acts on is not known: set its dropout to 0"
        )
    return found


def _of_overrides(trainer: Any) -> list[str]:
    found = []
    for kind, name in own_methods(trainer, "compute_loss", "training_step"):
        if _divides_by_steps(vars(kind)[name]):
            found.append(
                f"{kind.__name__}.{name} divides by gradient_accumulation_steps itself: let it "
                "return the mean of its micro-batch; exact() scales that"
            )
    return found


def _divides_by_steps(method: Any) -> bool:
    """Whether a function's source divides by the number of accumulation steps."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return False
    divisors = [
        node.right if isinstance(node, ast.BinOp) else node.value
        for node in ast.walk(tree)
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Div)
    ]
    inside = [part for divisor in divisors for part in ast.walk(divisor)]
    return any(getattr(p, "attr", getattr(p, "id", None)) in _STEPS for p in inside)
