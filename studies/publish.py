"""Put finished studies into docs/studies, and their tables into its README.

python studies/publish.py runs/accumulation-llama runs/accumulation-qwen2 runs/accumulation
python studies/publish.py        # only draw again what is there
"""

import re
import shutil
import sys
from pathlib import Path

from PIL import Image

from samestep.study.comparison import ArmComparison, compare_arms, format_change
from samestep.study.report import write_report
from samestep.study.results import Results, load_results

HOME = Path(__file__).resolve().parent.parent / "docs" / "studies"
HEADERS = (
    *("arm", "completions cut", "spread of lengths", "gradient off by", "cosine"),
    *("evaluation loss vs reference", "95 % interval", "noise between seeds", "training"),
)
WORDS = {
    "worse": "**worse**",
    "better": "**better**",
    "small": "told apart, but within the noise",
    "unresolved": "no difference shown",
    "one seed": "one seed: no claim",
    "diverged": "diverged",
    "no reference": "nothing to compare with",
}


def summary(results: Results) -> str:
    """The verdicts of a study as a table in Markdown."""
    arms = {(arm.group, arm.label): arm for arm in results.arms}
    spread = {one.cut: one.spread for one in results.lengths}
    rows: list[tuple[str, ...]] = [HEADERS, ("---",) * len(HEADERS)]
    for one in compare_arms(results):
        cut = arms[one.group, one.arm].cut
        rows.append((one.arm, f"{cut:.0%}", f"{spread[cut]:.2f}", *_measured(one)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _measured(one: ArmComparison) -> tuple[str, ...]:
    return (
        _size(one.gradient_difference),
        "-" if one.cosine is None else f"{one.cosine:.3f}",
        format_change(one.change),
        f"{format_change(one.interval.low)} to {format_change(one.interval.high)}"
        if one.interval
        else "-",
        "-" if one.seed_std is None else f"{one.seed_std:.3f}",
        WORDS[one.outcome],
    )


def _size(difference: float | None) -> str:
    if difference is None:
        return "-"
    if difference < 0.01:
        return f"{difference:.1e}"
    return f"{difference:.0%}" if difference < 10 else f"{difference:,.0f} times"


def fill_tables(text: str, home: Path) -> str:
    """The README with the table of each study between its marks."""

    def table(found: re.Match[str]) -> str:
        results = load_results(home / found[1] / "results.json")
        return f"<!-- {found[1]} -->\n{summary(results)}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Copy, draw, fill in."""
    for source in map(Path, sys.argv[1:]):
        target = HOME / source.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "results.json", target / "results.json")
    for file in sorted(HOME.glob("*/results.json")):
        for path in write_report(load_results(file), file.parent):
            if path.suffix == ".png":
                # A tenth of the bytes: few colours, and better compression than the drawer's.
                Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    readme = HOME / "README.md"
    readme.write_text(fill_tables(readme.read_text(encoding="utf-8"), HOME), encoding="utf-8")


if __name__ == "__main__":
    main()
