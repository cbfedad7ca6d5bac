"""YAML that is no settings: refused in one line, at once."""

import os
from pathlib import Path
from typing import Any

import pytest

from samestep.errors import ConfigError
from samestep.utils.messages import read_yaml

LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", r"'lr' stands in line 1 already"),
        ("batch_size: 4\nbatch-size: 8\n", "batch_size is given twice"),
        ("outer:\n  a: 1\n  a: 2\n", "'a' stands in line 2 already"),
        ("a: !!binary aGVsbG8=\n", "could not determine a constructor"),
        ("a: !!set {b, c}\n", "could not determine a constructor"),
        ("a: !!timestamp 2024-01-01\n", "could not determine a constructor"),
        ("a: !own b\n", "could not determine a constructor"),
        ("? [a, b]\n: c\n", "a field must be a plain word"),
        (f"steps: {'9' * 5000}\n", "no number that can be read"),
        ("steps: 99999999999999999999\n", "too large a number"),
        ("a: !!int x\n", "no number that can be read"),
        ("a: !!float x\n", "no number that can be read"),
        ("a: !!bool x\n", "not YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        (LAUGHS, "far larger than what is written"),
        ("a: &a [*a]\n", "an alias of what it stands in"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: \x00", "not YAML"),
        ("", "not NoneType"),
    ],
    ids=lambda value: value[:20],
)
def test_it_is_refused_with_a_reason(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as error:
        read_yaml(path)
    assert len(str(error.value)) < 2000


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("data: 2024-01-01\nlr: 1.0e-3\n", {"data": "2024-01-01", "lr": 0.001}),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  d: [true, null]\n", None),
    ],
)
def test_plain_files_are_read(tmp_path: Path, text: str, fields: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_yaml(path) == (fields or {"a": {"b": 1}, "c": {"b": 1, "d": [True, None]}})
