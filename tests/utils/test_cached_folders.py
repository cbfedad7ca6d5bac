"""Folders of the cache: whole or not there, whatever kills, other runs and damage leave."""

import fcntl
import shutil
import threading
from pathlib import Path

import pytest

from samestep.utils.cached_folders import cached_folder


def make(folder: Path) -> None:
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "weights").write_bytes(b"12345678")


def content(folder: Path) -> bytes:
    return (folder / "weights").read_bytes()


def made_again(folder: Path) -> bool:
    """Whether the next call makes the folder anew; it must be whole afterwards."""
    calls: list[Path] = []

    def count(place: Path) -> None:
        calls.append(place)
        make(place)

    assert content(cached_folder(folder, count)) == b"12345678"
    assert content(folder) == b"12345678"
    return bool(calls)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "abc"
    assert made_again(folder)
    assert not made_again(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "weights", "samestep-files.json"])
@pytest.mark.parametrize("damage", ["gone", "short", "empty"])
def test_a_folder_that_is_not_whole_is_made_anew(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "short" else b"")
    assert made_again(folder)
    assert not made_again(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["abc"]


def test_what_a_kill_has_left_is_deleted_and_what_another_run_makes_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "abc"
    (tmp_path / ".abc.left").mkdir()
    (tmp_path / ".abc.left" / "weights").write_bytes(b"half")

    def make_while_another_begins(place: Path) -> None:
        make(place)
        assert content(cached_folder(folder, make)) == b"12345678"
        assert content(place) == b"12345678"

    assert content(cached_folder(folder, make_while_another_begins)) == b"12345678"
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]


def test_many_at_once_get_the_same_content(tmp_path: Path) -> None:
    found: list[bytes] = []

    def run() -> None:
        found.append(content(cached_folder(tmp_path / "abc", make)))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"12345678"] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]


def test_a_folder_that_another_takes_for_abandoned_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock a folder looks as if a kill had left it."""
    taken: list[Path] = []
    flock = fcntl.flock

    def first_by_another(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            raise BlockingIOError
        flock(descriptor, operation)

    def fill(place: Path) -> None:
        shutil.rmtree(taken[0])  # the other deletes it only now
        make(place)

    monkeypatch.setattr(fcntl, "flock", first_by_another)
    assert content(cached_folder(tmp_path / "abc", fill)) == b"12345678"
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        make(place)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        cached_folder(tmp_path / "abc", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a file above", "a file in its place"])
def test_where_nothing_can_be_kept_the_content_is_there(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cache" / "abc"
    if kind == "a file above":
        folder.parent.write_text("", encoding="utf-8")
    else:
        folder.parent.mkdir()
        folder.write_text("", encoding="utf-8")
    assert content(cached_folder(folder, make)) == b"12345678"
