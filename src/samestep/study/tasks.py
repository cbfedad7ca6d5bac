"""From a spec to its runs: the rows that they read, and what each depends on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.data.examples import Examples
from samestep.models.load import load_tokenizer, resolve
from samestep.study.arm import Job
from samestep.study.cache import fingerprint, run_key
from samestep.study.results import Lengths
from samestep.study.rows import cut_completions, lengths_of, read_examples, write_examples
from samestep.study.spec import Arm, StudySpec
from samestep.train.checked import checked
from samestep.train.config import TrainConfig
from samestep.train.objectives.causal_lm import CausalLMConfig
from samestep.utils.files import sha256_of

SHARED = (
    *("init", "steps", "optimizer", "schedule", "warmup", "weight_decay", "max_grad_norm"),
    *("dtype", "device"),
)
"""Fields that a study hands on to `samestep train` as they are."""


@dataclass(frozen=True)
class Task:
    """One arm with one seed.

    Attributes:
        arm: The arm.
        job: What the run depends on; its seed is in the config.
        file: Where its result is kept.
    """

    arm: Arm
    job: Job
    file: Path

    @property
    def seed(self) -> int:
        """The seed."""
        return self.job.config.seed


def reference_arms(grid: Sequence[Arm]) -> dict[tuple[Any, ...], Arm]:
    """The arm that each group is compared with: exact, with the largest micro-batch.

    Args:
        grid: All arms.

    Returns:
        The reference by group; a group without an exact arm has none.
    """
    references: dict[tuple[Any, ...], Arm] = {}
    for arm in grid:
        best = references.get(arm.group())
        if arm.normalisation == "exact" and (best is None or arm.micro_batch > best.micro_batch):
            references[arm.group()] = arm
    return references


def prepare_rows(spec: StudySpec, source: str, folder: Path) -> list[Lengths]:
    """Tokenise the rows once, and write them for each share of cut completions.

    Args:
        spec: The study.
        source: The model, as `samestep.models.load.resolve` gave it.
        folder: Where the files go.

    Returns:
        How unequal the training rows are, for each share.

    Raises:
        ConfigError: There is no tokenizer.
        DataError: The rows cannot be used.
    """
    tokenizer = load_tokenizer(resolve(spec.tokenizer or source))

    def examples(data: str, rows: int | None) -> Examples:
        return read_examples(data, tokenizer, rows=rows, max_length=spec.max_length)

    kinds = {
        "train": examples(spec.data, spec.rows),
        "eval": examples(spec.eval_data, spec.eval_rows),
    }
    lengths = []
    for cut in sorted({arm.cut for arm in spec.grid()}):
        for kind, whole in kinds.items():
            shortened = cut_completions(whole, cut, keep=spec.cut_targets)
            write_examples(_rows_file(folder, kind, cut), shortened)
            if kind == "train":
                lengths.append(lengths_of(shortened, cut=cut))
    return lengths


def plan_tasks(spec: StudySpec, source: str, out: Path) -> list[Task]:
    """Every run of a study.

    Args:
        spec: The study.
        source: The model, as `samestep.models.load.resolve` gave it.
        out: The study's folder, its rows prepared.

    Returns:
        The tasks: seeds within arms, arms in the order of the spec.
    """
    grid = spec.grid()
    references = reference_arms(grid)
    model = fingerprint(source)
    rows = {
        cut: [_rows_file(out / "rows", kind, cut) for kind in ("train", "eval")]
        for cut in {arm.cut for arm in grid}
    }
    digests = {cut: [sha256_of(path) for path in files] for cut, files in rows.items()}
    tasks = []
    for arm in grid:
        # The undivided exact arm is what gradients are compared with: it has nothing to compare.
        undivided = references.get(arm.group()) is arm and arm.micro_batch == arm.batch
        rest: dict[str, Any] = {
            "normalisation": arm.normalisation,
            "gradient_steps": () if undivided else spec.gradient_steps,
            "eval_every": spec.eval_every,
        }
        for seed in arm.seeds:
            config = _config(spec, arm, seed, source=source, rows=rows[arm.cut], out=out)
            key = run_key(config, contents=[model, *digests[arm.cut]], **rest)
            file = out / "runs" / f"{key}.json"
            weights = file.with_suffix(".safetensors")
            job = Job(key=key, config=config, weights=weights, **rest)
            tasks.append(Task(arm=arm, job=job, file=file))
    return tasks


def _rows_file(folder: Path, kind: str, cut: float) -> Path:
    return folder / f"{kind}-cut-{cut:g}.jsonl"


def _config(
    spec: StudySpec, arm: Arm, seed: int, *, source: str, rows: list[Path], out: Path
) -> TrainConfig:
    data, evaluation = map(str, rows)
    return checked(
        CausalLMConfig(
            model=source,
            tokenizer=spec.tokenizer,
            data=data,
            eval_data=evaluation,
            out=str(out),
            batch_size=arm.batch,
            micro_batch=arm.micro_batch,
            padding=arm.padding,
            lr=arm.lr,
            seed=seed,
            **{name: getattr(spec, name) for name in SHARED},
        )
    )
