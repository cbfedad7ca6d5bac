"""The bars that the project set itself, each judged on result files; and how they are printed."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

MAKERS = {"AMD": "AuthenticAMD", "Intel": "GenuineIntel"}
"""Makers of processors, whose products differ: each has result files of its own."""

BEST_OF_TRL = ("trl:", "trl-free:", "trl-packing:")
TRL_DEFAULT = "trl-default:8"


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: What is compared.
        found: The measured number; None where the results lack it.
        wanted: The bar.
        at_least: Whether the number must be at least the bar, or at most.
    """

    name: str
    found: float | None
    wanted: float
    at_least: bool = True

    @property
    def missed(self) -> bool:
        """Whether it was measured and not reached."""
        if self.found is None:
            return False
        return self.found < self.wanted if self.at_least else self.found > self.wanted

    def line(self) -> str:
        """The bar with its mark, as it is printed."""
        sign = ">=" if self.at_least else "<="
        if self.found is None:
            return f"not measured  {self.name} {sign} {self.wanted}"
        mark = "NOT REACHED" if self.missed else "reached"
        return f"{mark:12}  {self.name}: {self.found:.3g} (bar {sign} {self.wanted})"


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each contender's tokens/s, peak memory, and ratios to samestep's (the first).

    A run's rate is over all its steps: every contender sees the same rows once. The ratio of two
    contenders is the median over rounds, so that what disturbs a round disturbs both.
    """
    names = list(dict.fromkeys(run["name"] for run in runs))
    rates = {
        name: [run["tokens"] / sum(run["seconds"]) for run in runs if run["name"] == name]
        for name in names
    }
    peaks = {
        name: statistics.median(run["peak_bytes"] for run in runs if run["name"] == name)
        for name in names
    }
    rows = []
    for name in names:
        ratios = [own / other for own, other in zip(rates[names[0]], rates[name], strict=False)]
        rows.append(
            {
                "name": name,
                "tokens_per_second": statistics.median(rates[name]),
                "speed_of_samestep": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "peak_bytes": peaks[name],
                "memory_of_samestep": peaks[names[0]] / peaks[name],
            }
        )
    return rows


def load(name: str) -> dict[str, Any] | None:
    """A result file, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result file."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def file_of(what: str, processor: str) -> str:
    """The result file of what was measured on a processor, by its maker."""
    makers = [short.lower() for short, name in MAKERS.items() if name in processor]
    return f"{what}-{makers[0] if makers else 'other'}"


def _of_maker(maker: str) -> list[Bar]:
    """The bars of speed and memory on one maker's processors; TRL has the same precision."""
    gsm, tools, mixed = (
        load(file_of(f"train-{work}", MAKERS[maker])) for work in ("gsm", "tools", "gsm-mixed")
    )
    kernels = load(file_of("roofline", MAKERS[maker]))
    beside = [
        Bar(f"{maker}: tokens/s on gsm rows, x TRL's best", _over_trl(gsm), 2.0),
        Bar(f"{maker}: tokens/s on tool chats, x TRL's best", _over_trl(tools), 2.5),
        Bar(f"{maker}: memory on gsm rows, x TRL's default", _memory(gsm), 0.5, at_least=False),
        Bar(f"{maker}: share of the GEMM roofline", kernels and kernels["share"], 0.85),
    ]
    if maker == "Intel":  # with AMX, where products in bfloat16 are several times as fast
        name = f"{maker}: tokens/s on gsm rows under mixed, x TRL's best with autocast"
        beside[1:2] = [Bar(name, _over_trl(mixed), 2.5)]
    return beside


def all_bars() -> list[Bar]:
    """Every bar, on what the result files hold."""
    growth = load("growth")
    return [
        *(bar for maker in MAKERS for bar in _of_maker(maker)),
        Bar(
            "time of exact normalisation, share of a step",
            growth and growth["normalisation"]["share"],
            0.01,
            at_least=False,
        ),
        Bar("time linear in tokens, R^2", growth and growth["batch"]["r_squared"], 0.99),
        Bar(
            "peak memory, 512 examples a step / 8",
            growth and growth["batch"]["memory_ratio"],
            1.05,
            at_least=False,
        ),
        Bar(
            "planner, share of a step (1 M examples)",
            growth and growth["planner"]["share"],
            0.01,
            at_least=False,
        ),
        Bar(
            "memory a further token, 4,096 to 8,192 / 64 to 4,096 (checkpointed)",
            growth and growth["length"]["memory_ratio"],
            1.1,
            at_least=False,
        ),
    ]


def _over_trl(result: dict[str, Any] | None) -> float | None:
    rows = [] if result is None else result["summary"]
    found = [row["speed_of_samestep"] for row in rows if row["name"].startswith(BEST_OF_TRL)]
    return min(found, default=None)


def _memory(result: dict[str, Any] | None) -> float | None:
    rows = [] if result is None else result["summary"]
    found = [row["memory_of_samestep"] for row in rows if row["name"] == TRL_DEFAULT]
    return found[0] if found else None
