"""``bitwise``: what a run needs to have the same bits anywhere, and what it writes of them.

The step itself is `samestep.Bitwise`. Here is what it depends on outside of the step: the number of
threads, the environment that computed (compared when a run goes on), and ``digests.jsonl``: a line
with what the run started from, a line a step, and a line with the whole state at each checkpoint.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from samestep.engine.bitwise import Bitwise
from samestep.engine.collectives import all_gather_object, gather_results, on_rank_0
from samestep.engine.exact_sum import SUMS, digest_of, digest_of_all
from samestep.engine.repeatable import repeatable_operations
from samestep.engine.step import backward
from samestep.errors import ConfigError, OutOfMemoryError, SequenceTooLargeError, StepError
from samestep.kernels.gemm import onednn_is_faster, processor_name
from samestep.train.log import JsonLines, keep_steps
from samestep.train.micro_batches import MicroBatches, Report
from samestep.train.origin import differences
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup
from samestep.utils.memory import release_memory
from samestep.utils.version import package_version

log = logging.getLogger("samestep")

SHORT = 16
"""Hexadecimal digits of a weight's digest in the log; the digest of all of them is whole."""

Chosen = TypeVar("Chosen", bound=TrainSettings)


def choose_threads(settings: Chosen, folder: RunFolder) -> Chosen:
    """The settings with a number of threads: under ``bitwise`` it is part of the run.

    Args:
        settings: Finalized settings.
        folder: Of the run: one that goes on has the number that it had.

    Returns:
        The settings; unchanged without ``bitwise``.
    """
    if not settings.bitwise or settings.threads is not None:
        return settings
    before = (folder.settings_before() or {}).get("threads") if settings.resume else None
    number = gather_results(lambda: before or torch.get_num_threads())[0]
    return settings.model_copy(update={"threads": number})


@contextmanager
def repeatable(settings: TrainSettings) -> Iterator[None]:
    """The threads that settings name, and repeatable operations alone where they ask for those.

    Raises:
        ConfigError: ``bitwise`` or ``deterministic``, and an operation cannot be repeated.
    """
    before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        asks = next((name for name in ("bitwise", "deterministic") if getattr(settings, name)), "")
        with repeatable_operations(asks) if asks else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def log_threads() -> None:
    """Say how many threads compute, and how they wait."""
    policy = os.environ.get("OMP_WAIT_POLICY", "of the OpenMP library").lower()
    log.info("threads: %d; wait policy %s", torch.get_num_threads(), policy)


def environment(device: torch.device) -> dict[str, str]:
    """What bits depend on beside a run's settings and data.

    Args:
        device: Where the model is.

    Returns:
        Texts by name.
    """
    found = {
        "processor": processor_name(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "products by": "oneDNN" if onednn_is_faster() else "PyTorch's own choice",
        "way of summing and digesting": SUMS,
        "samestep": package_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": version("peft"),
    }
    if device.type == "cuda":
        # Who starts and feeds a GPU does not change what it computes.
        of_processor = ("processor", "vector instructions", "threads", "products by")
        found = {name: value for name, value in found.items() if name not in of_processor}
        found |= {
            "device": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return found


class BitRun:
    """The bits of a run under way, on one rank.

    Args:
        setup: What trains.
        origin: Of `samestep.train.resume.current_origin`.

    Attributes:
        sums: For `samestep.step`.

    Raises:
        ConfigError: Something of the run has no bits to keep.
    """

    def __init__(self, setup: TrainingSetup, *, origin: Mapping[str, Any]) -> None:
        _refuse_inexact_loads(setup)
        self.sums = Bitwise()
        self.start: dict[str, Any] = {
            "environment": environment(setup.micro_batches.device),
            "files": dict(origin["files"]),
            "data": setup.train.fingerprint(),
        }
        self._model, self._optimizer = setup.model, setup.optimizer
        self._log: JsonLines | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"sums": self.sums.state_dict(), "environment": self.start["environment"]}

    def restore(self, state: Mapping[str, Any] | None, path: Path) -> None:
        """Go on from a checkpoint.

        Args:
            state: Of `state`.
            path: Of the checkpoint.

        Raises:
            ConfigError: It was computed elsewhere, or not bit by bit.
        """
        if state is None:
            raise ConfigError(f"bitwise: {path} holds no grid: the run went without --bitwise")
        changed = differences(state["environment"], self.start["environment"])
        if changed:
            lines = "\n  - ".join(["", *changed])
            raise ConfigError(
                f"bitwise: {path} was computed elsewhere, and would not go on with the same "
                f"bits:{lines}\nGo on there, or here with --no-bitwise: the same step, but for "
                "rounding"
            )
        self.sums.load_state_dict(state["sums"])

    def open(self, folder: RunFolder, *, done: int) -> None:
        """Open ``digests.jsonl`` on rank 0, cut back to the steps that are done.

        Args:
            folder: Of the run, open for writing.
            done: Steps that a resumed run has behind it.
        """

        def start() -> None:
            keep_steps(folder.digests, done)
            self._log = JsonLines(folder.digests)
            if not done:
                self._log.write({"step": 0, "start": self.start})

        on_rank_0(start)

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()

    def after_step(self, step: int) -> None:
        """Write down what a step summed up.

        Raises:
            StepError: Ranks have summed up something else.
        """
        digest, each = self.sums.digest, self.sums.digests
        self._write({"step": step, "digest": digest, "sums": shortened(each)}, of=digest)

    def save(self, step: int) -> None:
        """Write down the digest of weights and moments.

        Raises:
            StepError: Ranks hold others.
        """
        each = state_digests(self._model, self._optimizer)
        digest = digest_of_all(list(each.items()))
        self._write({"step": step, "state": digest, "weights": shortened(each)}, of=digest)

    def _write(self, line: dict[str, Any], *, of: str) -> None:
        by_rank = all_gather_object(of)
        if any(digest != of for digest in by_rank):
            number = next(at for at, digest in enumerate(by_rank) if digest != by_rank[0])
            what = "weights or moments" if "state" in line else "summed gradients"
            raise StepError(
                f"bitwise: rank {number} has other {what} than rank 0 after step {line['step']}: "
                "the ranks do not compute alike (other processors, or a fault of one)"
            )
        on_rank_0(lambda: None if self._log is None else self._log.write(line))


def shortened(digests: Mapping[str, str]) -> dict[str, str]:
    """Digests as the log has them."""
    return {name: digest[:SHORT] for name, digest in digests.items()}


@torch.no_grad()
def state_digests(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """SHA-256 of every weight that trains, every buffer, and the optimizer's state of each weight.

    Args:
        model: Replicated.
        optimizer: Of its weights.

    Returns:
        By name, weights first; an optimizer's state is called by its weight's name and its own.
    """
    named = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
    found = {name: digest_of(weight) for weight, name in named.items()}
    kept = model.state_dict().keys()
    found |= {name: digest_of(value) for name, value in model.named_buffers() if name in kept}
    for weight, name in named.items():
        for key, value in sorted(optimizer.state.get(weight, {}).items()):
            found[f"{name} ({key})"] = digest_of(torch.as_tensor(value))
    return found


def _refuse_inexact_loads(setup: TrainingSetup) -> None:
    """What runs after a step sums over ranks too: exactly where all weights are whole numbers."""
    weights = setup.train.sequences.weights
    if getattr(setup.recipe.settings, "router_bias_rate", 0) and bool((weights % 1 != 0).any()):
        raise ConfigError(
            "bitwise: router_bias_rate with rows whose weight is no whole number: the loads of "
            "experts would be sums of floats over the ranks. Use whole weights, or leave it out"
        )


def fail_with_budget(
    work: Callable[[], Report],
    *,
    setup: TrainingSetup,
    micro_batches: MicroBatches,
    indices: Sequence[int],
) -> Report:
    """Do work; where memory runs out say which packs would fit, instead of cutting finer.

    Args:
        work: Runs all packs of the records.
        setup: What it runs.
        micro_batches: Cuts the records; of no use after an error.
        indices: The records.

    Returns:
        What the work returned.

    Raises:
        OutOfMemoryError: It did not fit.
    """
    try:
        return work()
    except SequenceTooLargeError:
        raise
    except OutOfMemoryError as error:
        problem = str(error)
    fitting = _fitting(setup, micro_batches=micro_batches, indices=indices)
    raise OutOfMemoryError(
        f"{problem}. Under --bitwise the packs are part of the run, so they are not cut finer "
        f"in silence. {fitting} in a new run (--overwrite), or turn on gradient_checkpointing there"
    )


def _fitting(setup: TrainingSetup, *, micro_batches: MicroBatches, indices: Sequence[int]) -> str:
    """The largest of ever halved budgets whose largest pack fits, found by running it."""
    model, objective = setup.model, setup.objective
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    while True:
        budget = micro_batches.halve(indices)
        pack = next(micro_batches.batches(indices, 0))
        # Beside weights and gradients a step holds its sums.
        held = [torch.zeros_like(weight, dtype=torch.int32) for weight in weights]
        try:
            backward(
                model, [pack], objective.loss_fn, counters=objective.counters, check_sums=False
            )
        except SequenceTooLargeError:
            return "Not even one row alone fits: shorten rows (max_length)"
        except OutOfMemoryError:
            fits = False
        else:
            fits = True
        finally:
            del held
            model.zero_grad()
        if not fits:
            release_memory()
            continue
        number, unit = budget.split()
        flag = "--micro-batch" if unit == "records" else "--micro-tokens"
        return f"Its largest pack fits with {flag} {number} (tried): use that"
