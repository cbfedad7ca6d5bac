"""Builds wheel and sdist into dist/, and tries the wheel in an empty virtual environment.

    python tools/release.py

Nothing of the working tree is on the path there: what a file of the package lacks, shows.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"

IN_WHEEL = ("samestep/py.typed", "samestep/audit/page.html", "samestep/study/page.html")
IN_SDIST = ("LICENSE", "data/NOTICE.md", "CHANGELOG.md", "docs/step.md", "constraints.txt")
"""What they must hold beside the modules."""


def build(folder: Path = DIST) -> tuple[Path, Path]:
    """Build both from the working tree, without the network.

    Args:
        folder: Where to; what it holds is deleted.

    Returns:
        The wheel and the sdist.

    Raises:
        SystemExit: It fails, or a file is missing in one of them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py")]
    with zipfile.ZipFile(wheel) as archive:
        wanted = [*IN_WHEEL, *(name.removeprefix("src/") for name in modules)]
        check_contents(wheel, archive.namelist(), wanted)
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        check_contents(sdist, names, [*IN_SDIST, *modules])
    return wheel, sdist


def check_contents(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse an archive that lacks a file, or holds tests.

    Args:
        path: The archive.
        names: What it holds.
        wanted: What it must hold.

    Raises:
        SystemExit: A file is missing, or a test is in it.
    """
    missing = [name for name in wanted if name not in names]
    tests = [name for name in names if name.startswith("tests/")]
    if missing or tests:
        sys.exit(f"{path}: it lacks {missing}, and holds the tests {tests[:3]}")


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install a wheel into an empty virtual environment, and run its commands outside the tree.

    Args:
        wheel: The wheel.
        folder: An empty folder outside the tree.

    Raises:
        SystemExit: A command ends with another exit code than it should.
    """
    venv.create(folder / "venv", with_pip=True)
    python, samestep = folder / "venv/bin/python", str(folder / "venv/bin/samestep")
    constraints = str(ROOT / "constraints.txt")
    run([str(python), "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel)])
    work = folder / "work"
    work.mkdir()
    version = run([samestep, "--version"], cwd=work).strip()
    if version.removeprefix("samestep ") != wheel.name.split("-")[1]:
        sys.exit(f"`samestep --version` says {version!r}, the wheel is {wheel.name}")
    run([samestep, "--help"], cwd=work)
    run([samestep, "check", "--init", "my_loop.py"], cwd=work)
    # The loop of the template divides each micro-batch by itself: the check must find that.
    report = run([samestep, "check", "my_loop.py"], cwd=work, code=1)
    if "mean-of-means" not in report:
        sys.exit("`samestep check my_loop.py` did not name the cause, mean-of-means")


def run(command: Sequence[str], *, cwd: Path | None = None, code: int = 0) -> str:
    """Run a command, show what it prints, and insist on its exit code.

    Args:
        command: Program and arguments.
        cwd: Where it runs; None: here.
        code: The exit code that it should end with.

    Returns:
        What it printed to stdout.

    Raises:
        SystemExit: It ended with another one.
    """
    print("$", " ".join(command), flush=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode != code:
        sys.exit(f"exit code {done.returncode}, not {code}: {' '.join(command)}")
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Build wheel and sdist, and try the wheel.")
    parser.parse_args(arguments)
    wheel, sdist = build()
    with tempfile.TemporaryDirectory(prefix="samestep-dist-") as folder:
        try_wheel(wheel, Path(folder))
    print(f"{wheel.relative_to(ROOT)} and {sdist.relative_to(ROOT)} are good")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
