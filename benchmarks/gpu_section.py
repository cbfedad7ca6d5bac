"""The GPU section of docs/performance.md, from what `benchmarks/gpu/gpu_run.py` has written."""

from typing import Any

MISSING = """\
## On a GPU

Written for, not yet run. Everything that needs a GPU is one script: `python
benchmarks/gpu/gpu_run.py` runs the tests marked `gpu`, compares splits, padding and packing in
every precision with float64, and measures `samestep train` without flags beside TRL and a compiled
loop on full shapes with random weights, in five minutes; it goes on past a part that fails.
`--tiny --device cpu` tries it without a GPU. No figure of a GPU stands here that this script did
not measure.
"""


def section(report: dict[str, Any] | None) -> str:
    """The section.

    Args:
        report: The script's results; None where there are none.

    Returns:
        Markdown; where nothing was measured, that it was not.
    """
    if report is None:
        return MISSING
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    done = {part["name"]: part["figures"] for part in report["parts"] if "figures" in part}
    missing = [part for part in report["parts"] if "error" in part]
    limit = done.get("limit", {}).get("flops_per_second")
    pieces = [
        "## On a GPU\n",
        f"Measured by `python benchmarks/gpu/gpu_run.py` on one {report['device']} ({versions}); "
        + (f"its limit, products of 8,192, is {limit / 1e12:.0f} TFLOP/s. " if limit else "")
        + "Random weights, ids made beforehand; two steps warm up, the others count. The share of "
        "the limit is told twice: by model FLOPs, and by those executed, since the head skips what "
        "is no target.\n",
        _tests(done),
        _exactness(done),
        _speeds(done, limit),
    ]
    if missing:
        lines = [f"- {part['name']}: {part['error']}" for part in missing]
        pieces.append("Not measured:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(piece for piece in pieces if piece)


def _tests(done: dict[str, Any]) -> str:
    return f"Tests marked `gpu`: {done['tests']['told']}.\n" if "tests" in done else ""


def _exactness(done: dict[str, Any]) -> str:
    rows = [
        f"| {name.split()[1]} | {precision} | {max(found['between_splits'].values()):.1e} "
        f"| {found.get('to_float64', float('nan')):.1e} |"
        for name, figures in done.items()
        if name.startswith("exactness")
        for precision, found in figures.items()
        if "error" not in found
    ]
    head = "| model | precision | between splits | to float64 |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def _speeds(done: dict[str, Any], limit: float | None) -> str:
    rows = []
    for name, found in done.items():
        if "tokens_per_second" not in found:
            continue
        work, contender = name.split(" ", 1)
        shares = [
            f"{found['flops_per_second'][kind] / limit:.0%}" if limit else "not known"
            for kind in ("model", "executed" if contender.startswith("samestep") else "model")
        ]
        rows.append(
            f"| {work} | {contender} | {found['tokens_per_second']:,.0f} | {' / '.join(shares)} "
            f"| {found['peak_bytes'] / 1e9:.1f} | {found['outside_steps']:.0f} |"
        )
    head = (
        "| work | contender | tokens/s | share of the limit (model / executed) | peak GB "
        "| s outside steps |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n" if rows else ""
