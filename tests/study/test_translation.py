"""README.zh-CN.md says what README.md says: the same headings, commands, tables and links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def skeleton(path: Path) -> list[str]:
    """A page without its prose: heading levels, code without comments, table shapes, links."""
    parts: list[str] = []
    in_code = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            in_code = not in_code
            parts.append(line)
        elif in_code:
            code = re.sub(r"(^|\s)#.*", "", line).rstrip()
            parts += [f"code {code}"] if code else []
        elif heading := re.match(r"#+ ", line):
            parts.append(heading[0].strip())
        elif line.startswith("|"):
            parts.append(f"row of {line.count('|')}")
    return parts


def targets(path: Path) -> list[str]:
    """Where the links point, without those between the two languages."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)]+)\)", text)
    return sorted(one for one in found if not one.startswith("README"))


def test_headings_commands_and_tables_are_the_same() -> None:
    assert skeleton(CHINESE) == skeleton(ENGLISH)


def test_links_are_the_same() -> None:
    assert targets(CHINESE) == targets(ENGLISH)


def test_it_is_in_chinese() -> None:
    prose = re.sub(r"```.*?```", "", CHINESE.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", prose, flags=re.MULTILINE)
    assert all(re.search(r"[\u4e00-\u9fff]", heading) for heading in headings[1:])
    assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 500
