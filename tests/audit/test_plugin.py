"""The plug-in, the action, the hook, and the page that tells of them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import samestep
from samestep.audit import command
from samestep.cli import main
from samestep.errors import CheckError

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ci.md"

LOOP = """
import torch
examples = [torch.full((n, 2), float(n)) for n in (1, 4, 2, 3)]
model = lambda: torch.nn.Linear(2, 1)
collate = torch.cat
def step(model, micro_batches):
    for micro in micro_batches:
        (model(micro).square().sum() / {divisor}).backward()
"""
SOUND = LOOP.format(divisor="sum(map(len, micro_batches))")
MEANS = LOOP.format(divisor="len(micro) / len(micro_batches)")
SUM = LOOP.format(divisor="len(micro)")
NAMES = "make_trainer = dict(model=model, examples=examples, collate=collate, step=step)"


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """A run within this one forgets what it imported, and PyTorch cannot be imported twice."""
    loop: dict[str, Any] = {}
    exec(SOUND, loop)
    samestep.check(loop)


def run_tests(pytester: pytest.Pytester, loop: str, marker: str) -> dict[str, int]:
    pytester.makepyfile(
        my_loop=loop,
        test_it=f"""
        import my_loop
        import pytest

        @pytest.mark.same_step({marker})
        def test_step(same_step):
            same_step()
        """,
    )
    sys.modules.pop("my_loop", None)
    result = pytester.inline_run("-p", "no:cacheprovider")
    return {name: len(found) for name, found in zip(
        ("passed", "skipped", "failed"), result.listoutcomes(), strict=True)}  # fmt: skip


@pytest.mark.parametrize(
    ("loop", "marker", "expected"),
    [
        (SOUND, 'my_loop, axes=["micro-batch", "order"]', (2, 0, 0)),
        (SOUND, "my_loop", (3, 12, 0)),
        (MEANS, 'my_loop, axes=["micro-batch", "order"]', (1, 0, 1)),
        (MEANS, 'my_loop, axes=["micro-batch"], known={"micro-batch": "mean-of-means"}', (0, 1, 0)),
        (SUM, 'my_loop, axes=["micro-batch"], known={"micro-batch": "mean-of-means"}', (0, 0, 1)),
        (SOUND, 'my_loop, axes=["micro-batch"], known={"micro-batch": "mean-of-means"}', (0, 0, 1)),
    ],
)
def test_each_axis_is_a_test(
    pytester: pytest.Pytester, loop: str, marker: str, expected: tuple[int, int, int]
) -> None:
    found = run_tests(pytester, loop, marker)
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(
    "marker", ['my_loop, axes=["order"], known={"ranks": "rng"}', "", "my_loop, axis=3"]
)
def test_a_wrong_marker_is_an_error_of_use(pytester: pytest.Pytester, marker: str) -> None:
    found = run_tests(pytester, SOUND, marker)
    assert found == {"passed": 0, "skipped": 0, "failed": 1}, "the file is not collected"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_s_ten_lines_run(pytester: pytest.Pytester) -> None:
    first, second = python_blocks()
    assert len(first.splitlines()) <= 10
    pytester.makepyfile(my_trainer=SOUND + NAMES, test_page=first)
    result = pytester.inline_run("-p", "no:cacheprovider")
    passed, skipped, failed = map(len, result.listoutcomes())
    assert (passed, skipped, failed) == (1, 2, 0), "this loop has no window and reports nothing"
    assert "known=" in second


def run_action(folder: Path, *, programs: Path, **inputs: str) -> tuple[int, str, str]:
    """The steps of the action, one after another as bash runs them; until one fails."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    unknown = inputs.keys() - action["inputs"].keys()
    assert not unknown
    given = {name: str(one.get("default", "")) for name, one in action["inputs"].items()} | inputs
    output, summary = folder / "output", folder / "summary"
    code = 0
    for path in (output, summary):
        path.touch()
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "text of the user's would be run as code"
        env = {
            name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: given[found[1]], value)
            for name, value in step["env"].items()
        }
        search = f"{programs}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder,
            env=os.environ | env | {
                "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary), "PATH": search,
            },
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        code = done.returncode
        if code:
            break
    written = [path.read_text(encoding="utf-8") for path in (output, summary)]
    return code, written[0], written[1]


def test_the_action_s_steps(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "my loop.py").write_text(MEANS, encoding="utf-8")
    given = {"subject": "my loop.py", "axes": "micro-batch", "install": ""}
    here = Path(sys.executable).parent
    code, output, summary = run_action(folder, programs=here, **given)
    assert (code, output) == (1, "verdict=fail\n")
    assert "mean-of-means" in summary
    assert (folder / "samestep-junit.xml").is_file()
    assert (folder / "samestep.sarif").is_file()


def test_the_action_passes_text_on_as_it_is(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\nexit 2\n', encoding="utf-8")
    stub.chmod(0o755)
    given = {"subject": "$(touch planted)", "baseline": "a b.json", "install": ""}
    code, output, summary = run_action(tmp_path, programs=stub.parent, **given)
    assert (code, output) == (2, "verdict=error\n")
    assert "<$(touch planted)>" in summary
    assert "<--baseline>\n<a b.json>" in summary
    assert not (tmp_path / "planted").exists()


def test_the_hook_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert {"id", "name", "entry", "language"} <= hook.keys()
    assert (hook["language"], hook["pass_filenames"]) == ("system", False)
    program, *arguments = shlex.split(hook["entry"])
    seen = []

    def audit(reference: str, *_: Any, **__: Any) -> None:
        seen.append(reference)
        raise CheckError("asked for")

    monkeypatch.setattr(command, "audit_in_child", audit)
    assert program == "samestep"
    assert main([*arguments, "my_loop.py", "--axes", "micro-batch"]) == 2
    assert seen == ["my_loop.py"]
