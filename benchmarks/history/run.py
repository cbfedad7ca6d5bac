"""Audits the trainers of each release in an environment of its own, and writes docs/history.md.

    python benchmarks/history/run.py                 all releases; resumes
    python benchmarks/history/run.py 4.44.2 5.24.0   these alone

What has a result in benchmarks/results/history is not measured again: delete it there first.
"""

import os
import subprocess
import sys
from pathlib import Path

from releases import RELEASES, ROOT, environment

from page import RESULTS, write_page

HERE = Path(__file__).parent


def main() -> int:
    chosen = sys.argv[1:] or list(RELEASES)
    unknown = [release for release in chosen if release not in RELEASES]
    if unknown:
        sys.exit(f"no such release here: {', '.join(unknown)}; there are {', '.join(RELEASES)}")
    failed = [release for release in chosen if measure(release)]
    write_page()
    return len(failed)


def measure(release: str) -> int:
    """Measure a release; returns the exit code of its process."""
    RESULTS.mkdir(exist_ok=True)
    paths = [ROOT / "src", HERE, ROOT / "benchmarks" / "audit"]
    command = [
        str(environment(release)),
        str(HERE / "measure.py"),
        str(RESULTS / f"{release}.json"),
    ]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
