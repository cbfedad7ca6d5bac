"""Settings of every test: no network, a cache of its own, the same random state."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings
from thorough import THOROUGH

from samestep.kernels import gemm

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # half of its trainers warn when they are imported


# The same examples in every run, and no verdict from the clock.
settings.register_profile(
    "samestep", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("samestep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``thorough``, and of ``sampled`` all but a part, always the same."""
    if THOROUGH:
        return
    left_out = {item for item in items if item.get_closest_marker("thorough") is not None}
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            cases[item.nodeid.partition("[")[0]].append(item)
    for group in cases.values():
        marker = group[0].get_closest_marker("sampled")
        assert marker is not None
        (of,) = marker.args
        # Not each second or third: of two parameters that could leave out a value of one of them.
        group.sort(key=lambda item: crc32(item.nodeid.encode()))
        left_out |= set(group[-(-len(group) // of) :])
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def log_left_as_it_was() -> Iterator[None]:
    """What a test, or a command within it, changes of the log does not reach the next test."""
    loggers = [logging.getLogger(), logging.getLogger("samestep")]
    before = [(log.level, log.disabled, log.propagate, list(log.handlers)) for log in loggers]
    disabled = logging.root.manager.disable
    yield
    logging.disable(disabled)
    for log, (level, off, propagate, handlers) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.disabled, log.propagate = off, propagate
        log.handlers[:] = handlers


@pytest.fixture(params=[False, True], ids=["blas", "onednn"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both libraries of products in turn, whatever this processor gains from."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: request.param)
    return bool(request.param)
