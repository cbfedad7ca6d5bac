"""A cache can fail in one way only: as if it were not there."""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from samestep.data.examples import Example, Examples
from samestep.data.tokenize import read_cache, write_cache
from samestep.train.micro_tokens import Costs, cached_costs
from samestep.utils.files import cache_folder

COSTS = Costs(0.5, 0.25, 1e6, 10.0)


def examples() -> Examples:
    return Examples.from_examples([Example.without_targets(torch.arange(5), weight=1.0, row=0)])


def unusable(folder: Path, kind: str) -> Path:
    """A place for a cache file that cannot be one."""
    if kind == "a file for a folder":
        folder.write_text("", encoding="utf-8")
    elif kind == "a folder for a file":
        (folder / "x").mkdir(parents=True)
    elif kind == "a pipe":
        folder.mkdir()
        os.mkfifo(folder / "x")
    elif kind == "a place where nothing can be made":
        return Path("/proc/samestep/x")
    return folder / "x"


KINDS = [
    *("a file for a folder", "a folder for a file", "a pipe"),
    "a place where nothing can be made",
]


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_cache_can_be_the_run_goes_on(tmp_path: Path, kind: str) -> None:
    path = unusable(tmp_path / "cache", kind)
    assert cached_costs(path, lambda: COSTS) == COSTS
    assert read_cache(path) is None or kind == "a pipe"
    write_cache(path, examples())


def damages(whole: bytes, number: int) -> list[bytes]:
    """Flipped bits, cuts and gaps."""
    draw, found = random.Random(0), [b"", b"[" * 9999, b"null", whole[:8]]
    for _ in range(number):
        at, kind = draw.randrange(len(whole)), draw.randrange(3)
        flipped = bytes([whole[at] ^ (1 << draw.randrange(8))])
        found.append(whole[:at] + (flipped + whole[at + 1 :], b"", whole[at + 3 :])[kind])
    return found


def test_damaged_costs_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "costs"
    cached_costs(path, lambda: COSTS)
    for content in damages(path.read_bytes(), 300):
        path.write_bytes(content)
        costs = cached_costs(path, lambda: COSTS)
        assert costs is not None
        assert costs.seconds_per_token > 0
    for name, value in (("seconds", None), ("seconds", "1"), ("seconds_per_token", -1)):
        path.write_text(json.dumps({**vars(COSTS), name: value}), encoding="utf-8")
        assert cached_costs(path, lambda: COSTS) == COSTS


def test_damaged_tokens_are_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    write_cache(path, examples())
    fingerprint = examples().fingerprint()
    for content in damages(path.read_bytes(), 300):
        path.write_bytes(content)
        found = read_cache(path)
        assert found is None or found.fingerprint() == fingerprint


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SAMESTEP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().is_dir()
