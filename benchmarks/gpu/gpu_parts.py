"""The parts of the GPU script, in the order of their worth."""

from dataclasses import dataclass

from gpu_works import HERE, ROOT


@dataclass(frozen=True)
class Part:
    """A part: a command whose last line of figures is JSON, or that only succeeds or fails.

    Attributes:
        name: In the results.
        command: After the interpreter.
        seconds: What it may take.
        figures: Whether it prints lines of JSON.
        needs: A module without which it cannot run; empty if none.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    figures: bool = True
    needs: str = ""


FIRST = ("samestep:layers", "samestep")
"""On the work of most worth, before anything else is measured."""

ON_CPU = ("samestep:none", "samestep")
"""The same where a try runs: packs do not compile whole on a CPU."""

PEERS = {
    "llama-1b-gsm": (
        *("trl-best:128", "plain:32", "trl:32", "trl-liger:64"),
        *("trl-free:32", "trl-pack:16", "trl-bf16:128"),
    ),
    "smollm2-gsm": ("trl-best:128", "plain:64", "trl-free:64", "trl-pack:32"),
    "llama-1b-tools": ("trl-best:32", "trl-liger:8", "trl-free:8", "trl-pack:8"),
    "llama-1b-long": ("trl-best:2", "trl:1", "trl-liger:1"),
    "llama-8b-lora": ("trl-best:16", "trl:8"),
    "qwen2-gsm": ("trl-best:64", "trl-pack:16"),
}
"""Works by their worth, each with TRL as it was found best, and what else is compared."""

TINY = {"tiny": ("trl-best:8", "plain:8", "trl:4", "trl-free:8", "trl-pack:1", "trl-bf16:8")}

_TESTS = ("-m", "pytest", "-v", "-p", "no:cacheprovider", str(ROOT / "tests/gpu"), "-m")


def parts(device: str, *, tiny: bool) -> list[Part]:
    """What is run, in the order of its worth.

    Args:
        device: Where.
        tiny: A tiny model, to try the script itself.

    Returns:
        The quick tests; samestep on the first work; exactness; TRL at its best there; then the
        other works and their peers, and what else is known of TRL.
    """
    peers = TINY if tiny else PEERS
    shape = "tiny" if tiny else "smollm2-135m"
    first, *others = peers
    best, *more = peers[first]

    def contender(work: str, name: str) -> Part:
        command = (str(HERE / "gpu_contender.py"), name, "--work", work, "--device", device)
        needs = "liger_kernel" if name.startswith("trl-liger") else ""
        return Part(f"{work} {name}", command, 100 if name in FIRST else 75, needs=needs)

    def exactness(shape: str) -> Part:
        command = (str(HERE / "gpu_exactness.py"), "--shape", shape, "--device", device)
        return Part(f"exactness {shape}", command, 80)

    found = [Part("tests", (*_TESTS, "gpu and not slow"), 75, figures=False)]
    found += [contender(first, name) for name in (ON_CPU if tiny else FIRST)]
    found += [exactness(shape), contender(first, best)]
    for work in others:
        found += [contender(work, name) for name in ("samestep:layers", peers[work][0])]
    found.append(Part("tests that compile", (*_TESTS, "gpu and slow"), 150, figures=False))
    found += [contender(work, "samestep") for work in others]
    found += [contender(first, name) for name in more]
    found += [contender(work, name) for work in others for name in peers[work][1:]]
    return found if tiny else [*found, exactness("qwen2-0.5b")]
