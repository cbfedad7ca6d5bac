from pathlib import Path
from typing import Any

import pytest

from samestep.errors import ConfigError
from samestep.study.arms import Arm, arm_label, expand_grid, group_title, reference_arms
from samestep.study.command import read_study
from samestep.study.spec import StudySpec, parse_spec

NEEDED = {"model": "m", "data": "d", "eval_data": "e"}


def spec(**values: Any) -> StudySpec:
    return parse_spec({**NEEDED, **values}, source="test")


def expanded(**values: Any) -> list[Arm]:
    return expand_grid(spec(**values))


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        spec(**values)
    return str(error.value)


def test_without_axes_the_two_ends_of_the_split_are_compared() -> None:
    assert [arm.split for arm in expanded()] == ["32 x 1", "1 x 32"]
    assert [arm.split for arm in expanded(batch=1)] == ["1 x 1"]


def test_a_grid_is_every_combination() -> None:
    grid = expanded(
        batch=8,
        split=["8 x 1", "1\u00d78"],
        normalisation=["exact", "sum"],
        lr=[1e-3, 1e-4],
        cut=[0, 0.5],
    )
    assert len(grid) == 16
    assert {arm.split for arm in grid} == {"8 x 1", "1 x 8"}


def test_blocks_take_what_they_do_not_set_from_the_study() -> None:
    grid = expanded(
        batch=8,
        lr=0.5,
        seeds=[3, 4],
        arms=[
            {"split": ["8 x 1", "1 x 8"]},
            {"split": "1 x 8", "normalisation": "mean-of-means", "name": "the bug"},
            {"split": "1 x 8", "normalisation": "exact"},  # again
            {"batch": 4, "split": "2 x 2", "seeds": 7},
        ],
    )
    assert [arm.split for arm in grid] == ["8 x 1", "1 x 8", "1 x 8", "2 x 2"]
    assert [arm.seeds for arm in grid] == [(3, 4)] * 3 + [(7,)]
    assert {arm.lr for arm in grid} == {0.5}
    assert [arm_label(arm, grid) for arm in grid] == [
        "8 x 1 exact",
        "1 x 8 exact",
        "the bug",
        "2 x 2 exact",
    ]
    assert group_title(grid[0], grid, cut_targets=4) == "batch 8"


def test_every_problem_is_in_one_message_with_the_nearest_name() -> None:
    message = refused(
        stepss=3,
        normalisation="mean-of-mean",
        optimizer="adam",
        cut=[0.5, 2],
        arms=[
            {"splitt": "4 x 8"},
            {"split": "4 x 9"},
            {"split": "four"},
            {"normalisation": "exakt"},
        ],
    )
    for part in (
        "did you mean 'steps'",
        "did you mean 'mean-of-means'",
        "did you mean 'adamw'",
        "cut.1: input should be less than or equal to 1",
        "did you mean 'split'",
        "split '4 x 9' makes 36 examples a step, but batch is 32",
        "write micro-batch x accumulation",
        "did you mean 'exact'",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"arms": []}, "arms is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"arms": [{"lr": []}]}, "lr is empty"),
        ({"steps": 5, "gradient_steps": [5]}, "below steps"),
        ({"arms": [{"split": ["32 x 1", "1 x 32"], "name": "x"}]}, "is for one arm"),
        ({"model": None}, "model"),
        ({"lr": float("nan")}, "lr.0"),
        ({"arms": "1 x 32"}, "arms"),
        (
            {"arms": [{"split": "32 x 1", "name": "x"}, {"split": "1 x 32", "name": "x"}]},
            "two arms are called 'x'",
        ),
        ({"lr": 0.1, "arms": [{"lr": 0.2}, {"lr": 0.3}]}, "lr: every block of arms sets its own"),
    ],
)
def test_bad_specs_are_refused(values: dict[str, Any], part: str) -> None:
    assert part in refused(**values)


def test_what_is_missing_is_named_with_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"eval_data: is missing .*--eval-data"):
        parse_spec({"model": "m", "data": "d"}, source="x")


def test_the_reference_is_exact_and_the_least_divided() -> None:
    grid = expanded(
        arms=[
            {"split": "32 x 1", "normalisation": "sum"},
            {"split": ["1 x 32", "8 x 4"]},
            {"split": "1 x 32", "normalisation": "sum", "cut": 0.5},
        ]
    )
    assert [arm.split for arm in reference_arms(grid).values()] == ["8 x 4"]


def test_flags_win_over_yaml_and_can_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("model: a\ndata: d\neval-data: e\nsteps: 7\nseeds: [0, 1]\n", encoding="utf-8")
    found, out, jobs = read_study(
        [
            str(file),
            "--out",
            "o",
            "--model",
            "b",
            "--jobs",
            "2",
            "--seeds",
            "5",
            "--lr",
            "0.1",
            "0.2",
        ]
    )
    assert (found.model, found.steps, found.seeds, found.lr) == ("b", 7, (5,), (0.1, 0.2))
    assert (found.name, out, jobs) == ("my", Path("o"), 2)
    flags = ["--model", "a", "--data", "d", "--eval-data", "e", "--out", "o", "--batch", "4"]
    found, _, jobs = read_study([*flags, "--split", "4 x 1", "2 x 2"])
    assert [arm.split for arm in expand_grid(found)] == ["4 x 1", "2 x 2"]
    assert jobs == 1


@pytest.mark.parametrize("text", ["- a\n", "{", "x: [\n"])
def test_a_file_that_is_no_study_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_study([str(file), "--out", "o"])


@pytest.mark.parametrize("file", sorted(Path("studies").glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_studies_are_good(file: Path) -> None:
    found, _, _ = read_study([str(file), "--out", "o", "--model", "m"])
    assert len(expand_grid(found)) >= 3
    assert {arm.normalisation for arm in expand_grid(found)} >= {"exact", "mean-of-means"}


def test_names_that_a_terminal_or_a_figure_cannot_show_are_refused() -> None:
    block = {"name": "a\x1b[2J", "split": "32 x 1"}
    assert "cannot be shown" in refused(arms=[block, {"split": "1 x 32"}])


def test_a_field_that_is_given_twice_in_a_block_is_refused() -> None:
    assert "lr_ is given twice" in refused(arms=[{"lr-": 1, "lr_": 2}, {"split": "1 x 32"}])
