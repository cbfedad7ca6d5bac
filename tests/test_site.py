"""The site of the documentation builds without a warning, and holds what it should."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import samestep

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_every_public_name_has_its_place(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="(samestep\.\w+)"', page))
    names = {f"samestep.{name}" for name in samestep.__all__ if name != "__version__"}
    assert anchors - {"samestep.errors"} == names


def test_the_readme_opens_the_site(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "The optimizer step is a function of the effective batch alone" in page
    assert 'href="train/"' in page
    assert 'href="examples/own_loop.py"' in page
    assert (site / "examples" / "own_loop.py").is_file()


def test_every_page_is_in_the_navigation(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        if path.name != "index.md":
            assert f'href="{path.stem}/"' in page, path.name


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?https?://[^>]*>")
    for path in site.rglob("*.html"):
        if path.name == "index.html":
            assert loads.findall(path.read_text(encoding="utf-8")) == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?://", path.read_text(encoding="utf-8")), path
