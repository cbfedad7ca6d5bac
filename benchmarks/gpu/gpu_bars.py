"""What is asked of the figures of a GPU, and whether those that were measured reach it."""

from typing import Any

SPEED = {"llama-1b-gsm": 1.9, "smollm2-gsm": 2.5, "llama-1b-tools": 2.0}
"""Times TRL's tokens a second."""

SHARE = {"llama-1b-gsm": 0.55, "llama-1b-long": 0.5}
"""Of the limit, by the operations that are executed."""

TOKENS = {"llama-8b-lora": 12_500.0}
"""A second."""

MEMORY = {"llama-1b-gsm": 0.6}
"""Times the peak of TRL at its best."""

UNLIKE = "trl-bf16"
"""Loses updates to bfloat16 weights: no peer of float32 weights."""


def limit_of(parts: list[dict[str, Any]]) -> float | None:
    """The limit of the device: the fastest products that any part has seen."""
    found = [part.get("figures", {}).get("limit_flops_per_second") for part in parts]
    return max((one for one in found if one is not None), default=None)


def bars(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars that can be told from what was measured.

    Args:
        parts: The results of parts.

    Returns:
        For each what it is about, what was measured, the bound, and whether it holds.
    """
    by_work: dict[str, dict[str, dict[str, Any]]] = {}
    for part in parts:
        if "tokens_per_second" in part.get("figures", {}):
            work, _, name = part["name"].partition(" ")
            by_work.setdefault(work, {})[name] = part["figures"]
    found = []
    for work, figures in by_work.items():
        found += _of_work(work, figures, limit_of(parts))
    for part in parts:
        for name, bar in part.get("figures", {}).get("bars", {}).items():
            found.append({"bar": f"{part['name']}: {name}", "at_most": True, **bar})
    return found


def _of_work(
    work: str, figures: dict[str, dict[str, Any]], limit: float | None
) -> list[dict[str, Any]]:
    """Without flags where that was run; compiled layers are what it chooses in a longer run."""
    own = next((name for name in ("samestep", "samestep:layers") if name in figures), None)
    peers = [name for name in figures if name.startswith("trl") and not name.startswith(UNLIKE)]
    if own is None:
        return []
    mine, speed = figures[own], figures[own]["tokens_per_second"]
    best = max(peers, key=lambda name: figures[name]["tokens_per_second"], default=None)
    found = []

    def tell(what: str, measured: float, bound: float | None, *, at_most: bool = False) -> None:
        if bound is not None:
            holds = measured <= bound if at_most else measured >= bound
            bar = {"bar": f"{work}: {what}", "measured": measured, "bound": bound}
            found.append({**bar, "at_most": at_most, "holds": holds})

    if best is not None:
        trl, ran = figures[best], figures[best].get("ran", best)
        tell(f"{own}, times the speed of {ran}", speed / trl["tokens_per_second"], SPEED.get(work))
        memory = mine["peak_bytes"] / trl["peak_bytes"]
        tell(f"{own}, times the memory of {ran}", memory, MEMORY.get(work), at_most=True)
    if limit:
        share = mine["flops_per_second"]["executed"] / limit
        tell(f"{own}, share of the limit", share, SHARE.get(work))
    tell(f"{own}, tokens a second", speed, TOKENS.get(work))
    return found
