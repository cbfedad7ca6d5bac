"""What an extra lacks is one line with the command that installs it, and nothing is imported."""

import re
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from samestep import cli
from samestep.errors import ConfigError
from samestep.utils import extras
from samestep.utils.extras import MissingExtraError, install_command, require_installed

REQUIRES = (
    "torch>=2.9",
    'alpha>=2; extra == "train"',
    'beta<3,>=1; extra == "train"',
    'samestep[train]; extra == "vision"',
    'gamma; extra == "vision"',
    'delta; extra == "report"',
)


class Installed(Distribution):
    """A distribution that is said to be installed."""

    def __init__(self, version: str = "1.0", requires: tuple[str, ...] = (), url: str = "") -> None:
        self.held, self.needs, self.url = version, list(requires), url

    @property
    def version(self) -> str:
        return self.held

    @property
    def requires(self) -> list[str]:
        return self.needs

    @property
    def metadata(self) -> Message:
        return Message()

    def read_text(self, filename: str) -> str | None:
        return f'{{"url": "{self.url}"}}' if self.url and filename == "direct_url.json" else None

    def locate_file(self, path: Any) -> Any:
        return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Installed]:
    """The distributions that there are."""
    held = {"samestep": Installed(requires=REQUIRES)}

    def distribution(name: str) -> Installed:
        if name not in held:
            raise PackageNotFoundError(name)
        return held[name]

    monkeypatch.setattr(extras, "distribution", distribution)
    return held


def test_everything_that_is_missing_is_named_with_its_version(
    installed: dict[str, Installed],
) -> None:
    installed |= {"beta": Installed("3.1"), "gamma": Installed()}
    with pytest.raises(MissingExtraError) as error:
        require_installed("vision", what="an image")
    text = str(error.value)
    assert text.startswith("an image needs alpha>=2, beta<3,>=1 (here is 3.1): pip install ")
    assert "[vision]" in text
    assert "\n" not in text


def test_several_extras_are_asked_for_at_once(installed: dict[str, Installed]) -> None:
    installed["alpha"] = Installed("2.0")
    with pytest.raises(MissingExtraError, match=r"beta.*, delta: pip install .*\[train,report\]"):
        require_installed("train", "report", what="x")


def test_nothing_is_said_where_all_is_there(installed: dict[str, Installed]) -> None:
    installed |= {"alpha": Installed("2"), "beta": Installed("1.5+cpu"), "gamma": Installed()}
    require_installed("vision", what="x")


def test_a_package_that_only_stands_on_the_path_says_nothing(
    installed: dict[str, Installed],
) -> None:
    del installed["samestep"]
    require_installed("train", what="x")


def test_it_is_an_import_error_too() -> None:
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(MissingExtraError, ConfigError)


def test_the_command_names_where_the_package_came_from(
    installed: dict[str, Installed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(extras.__file__).parents[3]
    monkeypatch.chdir(root)
    assert install_command("train") == "pip install '.[train]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("train") == f"pip install '{root}[train]'"
    installed["samestep"] = Installed(url=root.as_uri())
    assert install_command("train") == f"pip install -e '{root}[train]'"
    # Installed from elsewhere: what pip was given, as long as it is there.
    site = tmp_path / "site-packages" / "samestep" / "utils" / "extras.py"
    monkeypatch.setattr(extras, "__file__", str(site))
    wheel = tmp_path / "samestep-1.whl"
    wheel.touch()
    installed["samestep"] = Installed(url=wheel.as_uri())
    assert install_command("a,b") == f"pip install '{wheel}[a,b]'"
    wheel.unlink()
    assert install_command("a") == "pip install 'samestep[a]'"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["train", "--help"], r"\[train\]"),
        (["study", "s.yaml"], r"delta.*\[train,report\]"),
        (["report", "d"], r"delta.*\[train,report\]"),
    ],
)
def test_a_command_without_its_extra_is_one_line(
    command: list[str],
    names: str,
    installed: dict[str, Installed],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert installed  # nothing but the core
    assert cli.main(command) == cli.BAD_INPUT
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert line.startswith(f"samestep: error: `samestep {command[0]}` needs alpha>=2, beta")
    assert re.search(names, line)
