"""Wheel and sdist hold what they should; `make dist` also installs the wheel and runs it."""

from pathlib import Path

import pytest

import release
import samestep


def test_the_archives_are_of_this_version_and_hold_every_module(tmp_path: Path) -> None:
    wheel, sdist = release.build(tmp_path / "dist")
    assert wheel.name == f"samestep-{samestep.__version__}-py3-none-any.whl"
    assert sdist.name == f"samestep-{samestep.__version__}.tar.gz"


@pytest.mark.parametrize(
    ("names", "message"), [(["a"], r"lacks \['b'\]"), (["a", "b", "tests/t.py"], "tests/t.py")]
)
def test_an_archive_with_other_contents_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        release.check_contents(Path("x.whl"), names, ["a", "b"])


def test_a_command_with_another_exit_code_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert release.run(["false"], code=1) == ""
    with pytest.raises(SystemExit, match="exit code 1, not 0"):
        release.run(["false"])
