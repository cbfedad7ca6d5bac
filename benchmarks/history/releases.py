"""The releases whose trainers are compared, and an environment for each of them.

Each release stands beside what was published with it. PyTorch is one for all, so that only the
trainers differ; it is installed once, with what samestep's core needs, and seen from each.
"""

import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv.history"
CONSTRAINTS = ROOT / "constraints.txt"

SHARED = ("torch", "numpy", "packaging", "rich", "tyro")
"""What `pip install samestep` needs: in one environment that the others see."""

_BEFORE_NUMPY_2 = ("numpy<2", "pyarrow<20")
RELEASES: Mapping[str, tuple[str, ...]] = {
    "4.44.2": ("accelerate==0.34.2", "trl==0.11.4", "datasets==2.21.0", *_BEFORE_NUMPY_2),
    "4.46.3": ("accelerate==1.1.1", "trl==0.12.2", "datasets==3.1.0", *_BEFORE_NUMPY_2),
    "4.48.3": ("accelerate==1.3.0", "trl==0.14.0", "datasets==3.2.0", *_BEFORE_NUMPY_2),
    "4.51.3": ("accelerate==1.6.0", "trl==0.17.0", "datasets==3.5.1", "pyarrow<20"),
    "4.57.1": ("accelerate==1.11.0", "trl==0.24.0", "datasets==4.3.0"),
    "5.0.0": ("accelerate==1.12.0", "trl==0.27.1", "datasets==4.5.0"),
    "5.12.1": ("accelerate==1.13.0", "trl==1.6.0"),
    "5.24.0": ("accelerate==1.15.0", "trl==1.16.0", "datasets==5.2.0"),
}
"""By the version of transformers, in the order in which they came."""


def environment(release: str, *, folder: Path = ENVIRONMENTS) -> Path:
    """The Python of a release's environment, made if it is not there.

    Args:
        release: A key of `RELEASES`.
        folder: Where the environments are.

    Returns:
        The path of the interpreter.

    Raises:
        CalledProcessError: pip could not install it.
    """
    shared = _made(folder / "shared", SHARED, constraints=CONSTRAINTS)
    pinned = folder / "torch.txt"
    pinned.write_text(f"torch=={_version_of(shared, 'torch')}\n", encoding="utf-8")
    packages = (f"transformers=={release}", *RELEASES[release])
    return _made(folder / release, packages, constraints=pinned, sees=shared)


def _made(
    folder: Path, packages: tuple[str, ...], *, constraints: Path, sees: Path | None = None
) -> Path:
    """An environment with these packages; one that was left half made is made anew."""
    python, done = folder / "bin" / "python", folder / "complete"
    if done.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    if sees is not None:
        own, other = (_site_packages(each) for each in (python, sees))
        (own / "shared.pth").write_text(f"{other}\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*command, *packages], check=True)
    done.touch()
    return python


def _site_packages(python: Path) -> Path:
    return Path(_printed(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))


def _version_of(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _printed(python, code).partition("+")[0]


def _printed(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    print(environment(sys.argv[1]))
