"""The GPU section of docs/performance.md, from what `benchmarks/gpu/gpu_run.py` has written."""

from typing import Any

MISSING = """\
## On a GPU

Written for, not yet run. Everything that needs a GPU is one script: `python
benchmarks/gpu/gpu_run.py` runs the tests marked `gpu`, measures `samestep train` without flags and
with compiled layers, compares splits, padding and packing in every precision with float64, and
measures TRL at its best and a compiled loop beside it, on full shapes with random weights. Parts
come by their worth and take five minutes (`--minutes 30`: all works, and every peer); one that
fails or hangs does not stop the others, and the results say which bars hold. `--tiny --device cpu`
tries it without a GPU, and `make test` runs its measurements on a tiny model. No figure of a GPU
stands here that this script did not measure.
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
    limit = report.get("limit_flops_per_second")
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
        _bars(report.get("bars", [])),
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
        if "between_splits" in found
    ]
    head = "| model | precision | between splits | to float64 |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def _bars(bars: list[dict[str, Any]]) -> str:
    rows = [
        f"| {bar['bar']} | {bar['measured']:.3g} | {'<=' if bar['at_most'] else '>='} "
        f"{bar['bound']:.3g} | {'yes' if bar['holds'] else 'no'} |"
        for bar in bars
    ]
    head = "| bar | measured | wanted | holds |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.0f}"


def _told(contender: str, found: dict[str, Any]) -> str:
    """What was run, where a contender is the best of several ways."""
    return f"{contender} ({found['ran']})" if found.get("ran") else contender


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
            f"| {work} | {_told(contender, found)} | {found['tokens_per_second']:,.0f} "
            f"| {' / '.join(shares)} | {found['peak_bytes'] / 1e9:.1f} "
            f"| {_seconds(found.get('outside_steps'))} |"
        )
    head = (
        "| work | contender | tokens/s | share of the limit (model / executed) | peak GB "
        "| s outside steps |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n" if rows else ""
