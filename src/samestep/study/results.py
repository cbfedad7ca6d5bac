"""What a study measured, typed, and its files: ``results.json`` and each finished run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from samestep.errors import ConfigError
from samestep.utils.files import write_atomically

FORMAT = 1
"""Of ``results.json`` and of the files of finished runs."""


class _ResultModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Steps(_ResultModel):
    """One value a step, in columns.

    Attributes:
        loss: Exact token loss on the step's batch before the update, whatever the arm optimises.
        objective: What the arm optimised.
        grad_norm: Norm of its gradient before clipping.
        targets: Targets in the batch.
        seconds: Wall-clock time of the step.
        tokens: Input tokens without padding.
    """

    loss: list[float] = []
    objective: list[float] = []
    grad_norm: list[float] = []
    targets: list[int] = []
    seconds: list[float] = []
    tokens: list[int] = []


class Evaluations(_ResultModel):
    """Token loss on the evaluation rows.

    Attributes:
        step: Updates made before.
        loss: The loss.
    """

    step: list[int] = []
    loss: list[float] = []


class Gradients(_ResultModel):
    """The arm's gradient beside the reference's, at the arm's weights, on the step's batch.

    Attributes:
        step: Updates made before.
        relative_difference: Norm of the difference over the norm of the reference's gradient.
        cosine: Of the angle between them.
        ratio: Norm over norm.
    """

    step: list[int] = []
    relative_difference: list[float] = []
    cosine: list[float] = []
    ratio: list[float] = []


class NoiseSums(_ResultModel):
    """What a step's micro-batches say about the noise of its gradient; see `noise_scale.py`.

    Attributes:
        signal: Unbiased estimate of the squared norm of the true gradient, by step.
        variance: Unbiased estimate of the trace of the covariance of one target's gradient.
    """

    signal: list[float] = []
    variance: list[float] = []


class Run(_ResultModel):
    """One arm with one seed.

    Attributes:
        seed: The seed.
        key: Of all that the run depends on.
        padding: The layout that was used.
        steps: By step.
        evaluations: By evaluation.
        gradients: Empty for the reference itself.
        noise: Empty unless the arm is exact and accumulates.
        distance_from_init: Norm of final minus initial weights; ``travelled`` in the files.
        distance: Norm of the difference to the reference's final weights, over the reference's
            ``distance_from_init``; None where either is missing.
        tokens_per_second: Over all steps but the first.
        peak_bytes: Memory of the process (CPU) or device while it stepped, without what only the
            comparison of gradients needs; None where it cannot be measured.
        diverged: Why and when it stopped early, or None.
    """

    seed: int
    key: str
    padding: str
    steps: Steps
    evaluations: Evaluations
    gradients: Gradients
    noise: NoiseSums
    distance_from_init: float = Field(
        validation_alias=AliasChoices("travelled", "distance_from_init"),
        serialization_alias="travelled",
    )
    distance: float | None = None
    tokens_per_second: float
    peak_bytes: int | None
    diverged: str | None


class ArmResult(_ResultModel):
    """One arm with all its seeds.

    Attributes:
        label: Its name in tables and figures; unique in its group.
        group: Arms of a group differ only in what must not matter.
        reference: Whether the group is compared with it.
        batch: Examples a step.
        split: Micro-batch x accumulation.
        normalisation: "exact", or one of the wrong ones.
        lr: Peak learning rate.
        cut: Share of the rows whose completion was cut.
        runs: One a seed.
    """

    label: str
    group: str
    reference: bool
    batch: int
    split: str
    normalisation: str
    lr: float
    cut: float
    runs: list[Run]

    def finished(self) -> list[Run]:
        """The runs that did not diverge, in order."""
        return [run for run in self.runs if run.diverged is None]


class Lengths(_ResultModel):
    """How unequal the training rows are.

    Attributes:
        cut: Share of the rows whose completion was cut.
        rows: How many rows.
        targets: Targets in all of them.
        p10: Of the targets a row, the 10th percentile.
        p50: The median.
        p90: The 90th percentile.
        spread: Standard deviation over mean of the targets a row.
    """

    cut: float
    rows: int
    targets: int
    p10: float
    p50: float
    p90: float
    spread: float


class Results(_ResultModel):
    """A study with all its arms.

    Attributes:
        format: Version of this format.
        name: Title.
        spec: The study as it was run.
        machine: Cores, threads, system, Python: kinds, not names.
        versions: Of samestep and of what computes.
        lengths: One for each value of ``cut``.
        arms: In the order of the spec.
        notes: What a reader must know, such as a damaged cache entry that was run again.
    """

    format: int = FORMAT
    name: str
    spec: dict[str, Any]
    machine: dict[str, str | int]
    versions: dict[str, str]
    lengths: list[Lengths]
    arms: list[ArmResult]
    notes: list[str] = []

    @property
    def precision(self) -> str:
        """Types of weights and products; earlier versions called the field ``dtype``."""
        return str(self.spec.get("precision") or self.spec["dtype"])

    def groups(self) -> dict[str, list[ArmResult]]:
        """The arms by group, in order."""
        groups: dict[str, list[ArmResult]] = {}
        for arm in self.arms:
            groups.setdefault(arm.group, []).append(arm)
        return groups


def round_floats(value: Any) -> Any:
    """A copy of plain values with floats at 7 significant digits.

    Args:
        value: Numbers, text, None, and lists and dictionaries of them.

    Returns:
        The copy.
    """
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    return [round_floats(item) for item in value] if isinstance(value, list) else value


def save_results(path: Path, results: Results) -> None:
    """Write ``results.json``, completely or not at all.

    Args:
        path: The file; its folder must exist.
        results: The results; floats keep 7 significant digits.

    Raises:
        OSError: It cannot be written.
    """
    values = round_floats(results.model_dump(by_alias=True))
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    write_atomically(path, text + "\n")


def load_results(path: Path) -> Results:
    """Read ``results.json``.

    Args:
        path: The file.

    Returns:
        The results.

    Raises:
        ConfigError: It is missing, or not the results of a study.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}): run the study first"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not the results of a study ({_first_line(error)})") from None


def save_run(path: Path, run: Run) -> None:
    """Write a finished run, with a digest of its content.

    Args:
        path: The file; its folder must exist.
        run: The run.

    Raises:
        OSError: It cannot be written.
    """
    body = run.model_dump_json(by_alias=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_atomically(path, json.dumps({"sha256": digest}) + "\n" + body + "\n")


def load_run(path: Path, key: str) -> Run | None:
    """Read a finished run.

    Args:
        path: The file.
        key: The key that the run must carry.

    Returns:
        The run, or None if there is no such file.

    Raises:
        ValueError: The file is damaged, or of another run.
    """
    if not path.exists():
        return None
    try:
        head, body = path.read_text(encoding="utf-8").splitlines()
        run = Run.model_validate_json(body)
        if json.loads(head)["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("its digest does not match")
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(_first_line(error)) from None
    if run.key != key:
        raise ValueError("it belongs to another run")
    return run


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
