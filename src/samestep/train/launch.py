"""The process group of a run, and starting its ranks: PyTorch's own launcher does both."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

from samestep.errors import ConfigError

_COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits in one collective: while rank 0 tokenises, converts or saves. Ranks that
die or hang in the loop are noticed much sooner, by `samestep.train.watchdog`."""

_SHUTDOWN_SECONDS = "60"
"""Seconds that ranks have to save after a signal, before the launcher kills them."""


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher of its kind) has started this process as one rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def launched() -> bool:
    """Whether the parent of this process is PyTorch's launcher, and ends when the run ends."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def store_is_of_launcher() -> bool:
    """Whether the launcher holds the store of the ranks; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks, if torchrun has started this process; leave them at the end.

    gloo on CPUs, nccl beside it on GPUs. A group that is there already is used and kept.
    """
    import torch  # not at the top: the command that only launches ranks needs no PyTorch
    from torch import distributed as dist

    if dist.is_initialized() or not under_torchrun():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    if dist.get_rank() > 0:
        logging.getLogger("samestep").setLevel(logging.ERROR)
    yield
    # After an error the other ranks may be gone: the process ends and takes its group along.
    dist.destroy_process_group()


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``samestep`` with these arguments in several processes on this machine.

    The same as ``torchrun --standalone --nproc-per-node RANKS -m samestep ...``.

    Args:
        ranks: How many.
        arguments: Those after ``samestep``.

    Returns:
        The exit code: 0, that of the first rank that failed, or 128 + the number of the signal.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "samestep", *arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"samestep: rank {number} was ended by {name}; the others too", file=sys.stderr)
            return 128 - int(failure.exitcode)
        return int(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def ranks_to_launch(ranks: int | None) -> int | None:
    """How many ranks this process must start; None if it is to be the (or a) run itself.

    Args:
        ranks: What the settings ask for.

    Raises:
        ConfigError: torchrun has started another number.
    """
    if not under_torchrun():
        return ranks if ranks is not None and ranks > 1 else None
    started = int(os.environ["WORLD_SIZE"])
    if ranks is not None and ranks != started:
        raise ConfigError(
            f"ranks: {ranks} are asked for, but torchrun has started {started}: leave ranks out"
        )
    return None


def is_first_on_machine() -> bool:
    """Whether this rank is the first one on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
