"""Whole studies of a tiny model, in processes of their own as a user's are."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import gpt2_folder, llama_folder, write_rows

from samestep.cli import main
from samestep.errors import StepError
from samestep.study.comparison import compare_arms
from samestep.study.results import Results, load_results, load_run, save_results, save_run
from samestep.study.rows import prepare_rows
from samestep.study.run import run_study
from samestep.study.spec import StudySpec, parse_spec
from samestep.study.tasks import plan_tasks

ARMS = [
    {"split": ["8 x 1", "1 x 8"]},
    {"split": "1 x 8", "normalisation": "mean-of-means"},
]


def spec(folder: Path, **changes: Any) -> StudySpec:
    """8 x 1 and 1 x 8 exact, and the mean of means; 4 steps of 8 of 20 rows in float64."""
    if not (folder / "tiny").exists():
        gpt2_folder(folder / "tiny")
        write_rows(folder / "rows.jsonl", 20)
        write_rows(folder / "eval.jsonl", 5, seed=1)
    values = {
        "model": str(folder / "tiny"),
        "data": str(folder / "rows.jsonl"),
        "eval_data": str(folder / "eval.jsonl"),
        "batch": 8,
        "steps": 4,
        "lr": 1e-2,
        "precision": "float64",
        "seeds": [0, 1],
        "arms": ARMS,
        **changes,
    }
    return parse_spec(values, source="test")


def run(folder: Path, *, said: list[str] | None = None, jobs: int = 1, **changes: Any) -> Results:
    lines: list[str] = [] if said is None else said
    return run_study(spec(folder, **changes), folder / "out", jobs=jobs, on_progress=lines.append)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A finished study; its folder is to be copied, not changed."""
    folder = tmp_path_factory.mktemp("study")
    said: list[str] = []
    results = run(folder, said=said, jobs=2)
    assert len([line for line in said if line.startswith("[")]) == 6
    return folder, results


def copied(first: tuple[Path, Results], target: Path) -> Results:
    shutil.copytree(first[0], target, dirs_exist_ok=True)
    return first[1]


def test_a_study_measures_every_arm_by_the_same_metrics(
    first: tuple[Path, Results], tmp_path: Path
) -> None:
    results = first[1]
    reference, exact, wrong = results.arms
    assert [arm.label for arm in results.arms] == [
        "8 x 1 exact",
        "1 x 8 exact",
        "1 x 8 mean-of-means (wrong)",
    ]
    assert reference.reference
    for arm in results.arms:
        for one in arm.runs:
            assert one.evaluations.step == [0, 1, 2, 3, 4]
            assert len(one.steps.loss) == 4
            assert one.distance_from_init > 0
            assert one.tokens_per_second > 0
            assert one.peak_bytes is None or one.peak_bytes > 10**7
    for one, base in zip(exact.runs, reference.runs, strict=True):
        # The same weights to rounding, although dropout is on and the batches were cut.
        assert one.steps.loss == pytest.approx(base.steps.loss, rel=1e-9)
        assert one.gradients.step == [0, 2, 3]
        assert max(one.gradients.relative_difference) < 1e-10
        assert one.distance is not None
        assert one.distance < 1e-7
        assert len(one.noise.signal) == 4
    for one, base in zip(wrong.runs, reference.runs, strict=True):
        # The first step has the same weights, so the metric is the same.
        assert one.steps.loss[0] == pytest.approx(base.steps.loss[0], rel=1e-9)
        assert one.steps.objective[0] != pytest.approx(base.steps.objective[0], rel=1e-6)
        assert min(one.gradients.relative_difference) > 0.05
        assert one.distance is not None
        assert one.distance > 0.05
    assert [one.same_step for one in compare_arms(results)] == [True, False]

    save_results(tmp_path / "results.json", results)
    again = load_results(tmp_path / "results.json")
    assert again.arms[2].label == results.arms[2].label
    assert again.arms[2].runs[1].steps.loss == pytest.approx(wrong.runs[1].steps.loss, rel=1e-6)


def test_what_is_finished_is_not_run_again(first: tuple[Path, Results], tmp_path: Path) -> None:
    before = copied(first, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    said: list[str] = []
    # One arm changed, one seed fewer.
    arms = [ARMS[0], {"split": "1 x 8", "normalisation": "sum"}]
    after = run(tmp_path, said=said, arms=arms, seeds=[0])
    assert said[0] == "2 of 3 runs are cached"
    assert len([line for line in said if line.startswith("[")]) == 1
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in files.items())
    assert after.arms[1].runs[0].steps == before.arms[1].runs[0].steps
    assert after.arms[2].runs[0].steps != before.arms[2].runs[0].steps


def test_other_rows_or_settings_are_other_runs(first: tuple[Path, Results], tmp_path: Path) -> None:
    copied(first, tmp_path)

    def keys(**changes: Any) -> set[str]:
        settings = spec(tmp_path, **changes)
        prepare_rows(settings, settings.model, folder=tmp_path / "out" / "rows")
        return {task.key for task in plan_tasks(settings, settings.model, out=tmp_path / "out")}

    kept = {path.stem for path in (tmp_path / "out" / "runs").glob("*.json")}
    assert keys() == kept
    assert keys(name="another title") == kept
    for changes in ({"lr": 2e-2}, {"steps": 5}, {"eval_every": 2}, {"eval_rows": 3}, {"cut": 1.0}):
        assert not keys(**changes) & kept, changes
    write_rows(tmp_path / "rows.jsonl", 20, seed=5)
    assert not keys() & kept


def test_a_damaged_entry_is_run_again_and_the_report_says_so(
    first: tuple[Path, Results], tmp_path: Path
) -> None:
    before = copied(first, tmp_path)
    key = before.arms[1].runs[0].key
    path = tmp_path / "out" / "runs" / f"{key}.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"travelled":', '"travelled":1'), encoding="utf-8")
    with pytest.raises(ValueError, match="digest"):
        load_run(path, key)
    said: list[str] = []
    after = run(tmp_path, said=said)
    (note,) = after.notes
    assert note == said[0]
    assert "cache entry of 1 x 8 exact, seed 0 was damaged: it was run again" in note
    assert said[1] == "5 of 6 runs are cached"
    assert after.arms[1].runs[0].steps.loss == before.arms[1].runs[0].steps.loss
    # An entry under another key does not count either.
    save_run(path, before.arms[0].runs[0])
    with pytest.raises(ValueError, match="another run"):
        load_run(path, key)


def test_a_diverged_arm_is_kept_and_marked(tmp_path: Path) -> None:
    arms = [{"split": "8 x 1"}, {"split": "8 x 1", "normalisation": "sum"}]
    changes: dict[str, Any] = {"optimizer": "sgd", "max_grad_norm": None, "lr": 1.0, "steps": 8}
    results = run(tmp_path, arms=arms, seeds=[0], **changes)
    blown = results.arms[1].runs[0]
    assert blown.diverged is not None
    assert blown.diverged.startswith("after ")
    assert 1 <= len(blown.steps.loss) < 8
    assert results.arms[0].runs[0].diverged is None
    assert compare_arms(results)[0].outcome == "diverged"


@pytest.mark.thorough
def test_a_killed_study_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec(tmp_path)
    (tmp_path / "study.yaml").write_text(
        json.dumps(
            {
                "model": "tiny",
                "data": "rows.jsonl",
                "eval_data": "eval.jsonl",
                "batch": 8,
                "steps": 6,
                "split": ["8 x 1", "1 x 8"],
            }
        ),
        encoding="utf-8",
    )
    arguments = ["study", "study.yaml", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "samestep", *arguments],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    runs = tmp_path / "out" / "runs"
    while not list(runs.glob("[!.]*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(runs.glob("[!.]*.json"))) == 1
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "1 of 2 runs are cached" in said.err
    assert "report in out/report.html" in said.out
    results = load_results(tmp_path / "out" / "results.json")
    assert [len(arm.runs) for arm in results.arms] == [1, 1]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    # Drawn again from the results alone.
    (tmp_path / "out" / "report.html").unlink()
    assert main(["report", "out"]) == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_a_run_that_cannot_start_names_the_reason(tmp_path: Path) -> None:
    llama_folder(tmp_path / "other")
    spec(tmp_path)
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(StepError, match=r"a run failed .*could not be loaded"):
        run(tmp_path, model=str(tmp_path / "other"))
