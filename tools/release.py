"""Builds wheel and sdist into dist/, and tries the wheel in empty virtual environments.

    python tools/release.py

In one with the core alone (PyTorch and small packages), which then gets the extra ``train`` by the
command that samestep itself names; and in one with transformers of 2024, which must stay as it is.
Nothing of the working tree is on the path there: what a file of the package lacks, shows.
"""

import argparse
import os
import shlex
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
HISTORY = ROOT / "benchmarks" / "history"

FORMER = "4.44.2"
"""A release of transformers that the core must leave as it is, and audit."""

NOT_IN_CORE = ("transformers", "accelerate", "trl", "datasets", "peft", "pydantic")

STEP = """
import samestep, torch

def loss_fn(model, rows):
    return samestep.Term(model(rows).square().sum(), unit="row")

def weights(size):
    torch.manual_seed(0)
    model, rows = torch.nn.Linear(3, 1).double(), torch.randn(6, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    samestep.step(model, optimizer, rows.split(size), loss_fn, counters={"row": len})
    return model.weight.detach()

assert torch.allclose(weights(6), weights(4), rtol=1e-12)
"""
"""A step of a plain loop, whose cut does not matter."""

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


def try_core(wheel: Path, folder: Path) -> None:
    """Install a wheel alone into an empty virtual environment, and run what its core promises.

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
    commands = run([samestep, "--help"], cwd=work)
    held = [name for name in NOT_IN_CORE if is_installed(python, name)]
    if held:
        sys.exit(f"the wheel alone installs {', '.join(held)}")
    run([samestep, "check", "--init", "my_loop.py"], cwd=work)
    # The loop of the template divides each micro-batch by itself: the check must find that.
    report = run([samestep, "check", "my_loop.py"], cwd=work, code=1)
    if "mean-of-means" not in report:
        sys.exit("`samestep check my_loop.py` did not name the cause, mean-of-means")
    run([str(python), "-W", "error", "-c", STEP], cwd=work)
    if "doctor" in commands:  # nothing is installed that it could find a fault in
        run([samestep, "doctor"], cwd=work)
    line = run([samestep, "train", "--help"], cwd=work, code=2, errors=True).strip()
    _, _, command = line.partition(": pip ")
    if "\n" in line or "[train]" not in command:
        sys.exit(f"`samestep train` without its extra says {line!r}")
    pip = [str(python), "-m", "pip", *shlex.split(command), "--quiet", "-c", constraints]
    run(pip, cwd=work)
    run([samestep, "train", "--help"], cwd=work)


def try_beside(wheel: Path, folder: Path) -> None:
    """Install a wheel beside an older transformers, which stays, and audit a trainer of that.

    Args:
        wheel: The wheel.
        folder: Where environments are made.

    Raises:
        SystemExit: The install changes a package, or the audit finds something else.
    """
    sys.path.insert(0, str(HISTORY))
    from releases import environment

    python = environment(FORMER, folder=folder)
    names = ("transformers", "accelerate", "trl", "numpy", "datasets")
    before = [version_of(python, name) for name in names]
    run([str(python), "-m", "pip", "install", "--quiet", "--no-index", str(wheel)])
    if before != [version_of(python, name) for name in names]:
        sys.exit(f"installing the wheel changed one of {', '.join(names)} ({before} before)")
    axes = ["--axes", "micro-batch,short-window"]
    for name, code in (("masked_lm", 1), ("sft_packed", 1)):
        subject = f"{HISTORY / 'subjects.py'}:{name}"
        run([str(python), "-m", "samestep", "check", subject, *axes], cwd=folder, code=code)


def is_installed(python: Path, name: str) -> bool:
    """Whether an environment has a package."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"
    return subprocess.run([str(python), "-c", code], check=False).returncode == 0


def version_of(python: Path, name: str) -> str:
    """The version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return run([str(python), "-c", code]).strip()


def run(
    command: Sequence[str], *, cwd: Path | None = None, code: int = 0, errors: bool = False
) -> str:
    """Run a command, show what it prints, and insist on its exit code.

    Args:
        command: Program and arguments.
        cwd: Where it runs; None: here.
        code: The exit code that it should end with.
        errors: Whether to return what it printed to stderr, too.

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
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else None,
        text=True,
        check=False,
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
        for name, attempt in (("core", try_core), ("beside", try_beside)):
            (Path(folder) / name).mkdir()
            attempt(wheel, Path(folder) / name)
    print(f"{wheel.relative_to(ROOT)} and {sdist.relative_to(ROOT)} are good")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
