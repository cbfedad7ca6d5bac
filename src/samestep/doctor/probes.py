"""The probes: what the doctor runs of each library that is installed, and of the user's."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samestep.audit.axes.axis import Axis, AxisResult, run_axis
from samestep.audit.axes.table import AXES, DEFAULT_AXES
from samestep.audit.check import as_subject, load_subject, refuse_hidden_scale
from samestep.audit.experiments import Experiments
from samestep.doctor.run import MODEL, TRAINER
from samestep.errors import CheckError, SamestepError
from samestep.utils.plugins import nearest

STEP_AXES = ("micro-batch", "short-window", "reported", "evaluation-batch")
"""What a probe of a trainer looks at; of a loop what it can."""

Source = Callable[[], Any]


@dataclass(frozen=True)
class Probe:
    """One subject and what would make it exact.

    Attributes:
        name: On the wire.
        title: In the report.
        needs: Packages without which there is nothing to probe.
        source: Makes the subject; imports what it needs.
        cure: What makes it exact.
        cured: Makes the cured subject.
        axes: The axes to run.
        named: Whether causes are named too, which takes longer.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    source: Source
    cure: str
    cured: Source
    axes: tuple[str, ...] = STEP_AXES
    named: bool = False

    def possible(self) -> bool:
        """Whether all that it needs is installed."""
        return all(importlib.util.find_spec(package) is not None for package in self.needs)


def _of_trainers(name: str) -> Source:
    def make() -> Any:
        from samestep.doctor import trainers

        return getattr(trainers, name)()

    return make


def _of_loops(name: str, **options: bool) -> Source:
    def make() -> Any:
        from samestep.doctor import loops

        return getattr(loops, name)(**options)

    return make


def made_exact(source: Source) -> Source:
    """The same factory of trainers with `samestep.hf.exact` applied to each."""

    def make() -> Any:
        from samestep.hf import exact

        factory = source()
        return lambda **sizes: exact(factory(**sizes))

    return make


def _trainer(name: str, title: str, *needs: str) -> Probe:
    source = _of_trainers(name)
    return Probe(name, title, ("transformers", "accelerate", *needs), source,
                 "samestep.hf.exact(trainer)", made_exact(source))  # fmt: skip


_TABLE = (
    _trainer("sft", "TRL SFT", "trl", "datasets"),
    _trainer("causal_lm", "Trainer, causal LM"),
    _trainer("masked_lm", "Trainer, masked LM"),
    _trainer("classification", "Trainer, classifier"),
    Probe(
        "lightning", "Lightning, mean loss", ("lightning",), _of_loops("LightningLoop"),
        "samestep.loops.lightning.exact(module, unit=...)", _of_loops("LightningLoop", exact=True),
    ),
    Probe(
        "accelerate", "accelerate, mean loss", ("accelerate",), _of_loops("AccelerateLoop"),
        "samestep.windows(loader, accelerator, unit=...)",
        _of_loops("AccelerateLoop", windows=True),
    ),
)  # fmt: skip

PROBES = {probe.name: probe for probe in _TABLE}
"""By name; the longest first, so that two processes end together."""


def probe_named(name: str) -> Probe:
    """A probe of the table, or one of the user's.

    Raises:
        CheckError: It names no model and no subject.
    """
    if name.startswith(MODEL):
        given = name.removeprefix(MODEL)
        source = model_source(given)
        return Probe(name, f"--model {given}", ("transformers",), source,
                     "samestep.hf.exact(trainer)", made_exact(source), named=True)  # fmt: skip
    if name.startswith(TRAINER):
        given = name.removeprefix(TRAINER)
        return Probe(name, f"--trainer {given}", (), lambda: load_subject(given),
                     "samestep.hf.exact(trainer)", lambda: _exact_of_file(given),
                     axes=DEFAULT_AXES, named=True)  # fmt: skip
    return PROBES[name]


def _exact_of_file(reference: str) -> Any:
    subject = load_subject(reference)
    factory = getattr(subject, "factory", None)
    if factory is None:
        raise CheckError("a loop of its own: `samestep.step` makes its step exact (docs/step.md)")
    return made_exact(lambda: factory)()


def model_source(given: str) -> Source:
    """A trainer of a class of transformers, or of that of a model's folder, at reduced size.

    Args:
        given: A class, or a folder with a ``config.json``.

    Raises:
        CheckError: It is neither, or no class that the probes have rows for.
    """
    from samestep.doctor import heads

    name, fields = given, None
    if Path(given).is_dir():
        name, fields = _class_of_folder(Path(given))
    known = sorted({each for names in heads.tasks().values() for each in names})
    if name not in known:
        raise CheckError(
            f"--model {given}: {name} is no class of the installed transformers that a Trainer "
            f"can be probed with{nearest(name, known)}. Give a class such as LlamaForCausalLM, a "
            "folder with a config.json, or your own trainer with --trainer FILE.py"
        )
    return lambda: heads.head(name, fields=fields)


def _class_of_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        architectures = fields["architectures"]
        return str(architectures[0]), dict(fields)
    except FileNotFoundError:
        raise CheckError(f"--model {folder}: there is no config.json in it") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckError(
            f"--model {folder}: config.json names no architecture ({type(error).__name__}: {error})"
        ) from error


def run_probe(name: str) -> dict[str, Any]:
    """Run a probe, and its cure if it is inexact.

    Args:
        name: See `probe_named`.

    Returns:
        ``verdict`` ("exact", "inexact" or "not run" with ``why``), ``axes``, and ``cure``: its
        ``name``, and the same of the cured subject; None if nothing is to be cured.
    """
    found: dict[str, Any] = {"probe": name, "title": name, "cure": None}
    try:
        probe = probe_named(name)
        found["title"] = probe.title
        found |= _judged(probe.source, probe.axes, named=probe.named)
    except Exception as error:  # what is installed may be broken in any way
        return found | {"verdict": "not run", "why": _why(error), "axes": []}
    if found["verdict"] == "inexact":
        inexact = [axis["name"] for axis in found["axes"] if axis["verdict"] == "inexact"]
        try:
            cured = _judged(probe.cured, inexact, named=False)
        except Exception as error:
            cured = {"verdict": "not run", "why": _why(error), "axes": []}
        found["cure"] = {"name": probe.cure, **cured}
    return found


def _judged(source: Source, axes: Sequence[str], *, named: bool) -> dict[str, Any]:
    subject = as_subject(source())
    experiments = Experiments.start(subject)
    chosen = [AXES[name] if named else _undiagnosed(AXES[name]) for name in axes]
    results = [run_axis(axis, experiments) for axis in chosen]
    inexact = any(result.verdict == "inexact" for result in results)
    if not inexact:
        refuse_hidden_scale(experiments)
    return {
        "verdict": "inexact" if inexact else "exact",
        "subject": subject.name,
        "examples": subject.size,
        "dtype": str(experiments.settings.dtype or "native").split(".")[-1],
        "axes": [vars(result if named else _unnamed(result)) for result in results],
    }


def _unnamed(result: AxisResult) -> AxisResult:
    """A result without the cause that nobody has looked for."""
    return replace(result, cause=None, residual=None, advice="")


def _undiagnosed(axis: Axis) -> Axis:
    """An axis that stops once it has measured: naming a cause takes as long again."""
    return replace(axis, measure=lambda found: replace(axis.measure(found), diagnose=None))


def _why(error: BaseException) -> str:
    text = str(error) if isinstance(error, SamestepError) else f"{type(error).__name__}: {error}"
    return text.strip() or type(error).__name__
