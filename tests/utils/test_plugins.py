"""Objects of the user's by reference."""

from pathlib import Path

import pytest

from samestep.errors import CheckError, ConfigError
from samestep.utils.plugins import load_object


def test_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 3\n", encoding="utf-8")
    file = tmp_path / "mine.py"
    file.write_text("from neighbour_of_mine import VALUE\n", encoding="utf-8")
    assert load_object(f"{file}:VALUE", what="objective") == 3
    assert load_object(str(file), what="objective").VALUE == 3
    assert load_object("pathlib:Path", what="objective") is Path


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere.py:name", "objective: there is no file nowhere.py; a hint"),
        (
            "no_such_package.module:name",
            "there is no module .no_such_package.module. that can",
        ),
        ("pathlib:Nothing", "objective: pathlib has no 'Nothing'; it has: .*PurePath"),
    ],
)
def test_what_is_not_there_is_named(reference: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_object(reference, what="objective", hint="; a hint")


def test_the_kind_of_error_is_chosen_and_shows_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(CheckError, match="ZeroDivisionError: division by zero"):
        load_object(f"{file}:name", what="subject", error=CheckError)
