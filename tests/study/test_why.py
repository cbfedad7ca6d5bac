import contextlib
import io
import re
from pathlib import Path

WHY = Path(__file__).parents[2] / "docs" / "why.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", WHY.read_text(encoding="utf-8"), re.DOTALL)


def test_the_worked_example_prints_what_the_page_says() -> None:
    (program,), (shown,) = blocks("python"), blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, str(WHY), "exec"), {})
    assert printed.getvalue() == shown


def test_what_the_page_says_about_the_example_is_so() -> None:
    text = " ".join(WHY.read_text(encoding="utf-8").split())
    targets = [[1.0] * 6, [1.0] * 3, [0.0], [0.0] * 2]
    flat = [target for row in targets for target in row]
    minimum = sum(flat) / len(flat)
    of_means = sum(sum(row) / len(row) for row in targets) / len(targets)
    assert f"would stop here, at {of_means:g}, while" in text
    assert f"has its minimum at {minimum:g}" in text
    assert len(flat) == 12
    assert "twelve times the exact gradient" in text
    assert (flat.count(1.0), flat.count(0.0)) == (9, 3)
    assert "-0.5 at each of nine targets, and +0.5 at each of three" in text
