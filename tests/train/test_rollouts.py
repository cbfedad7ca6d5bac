"""Rollouts that are generated: the same for any split, ranks and resume, and what may go wrong."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import worst
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from thread_ranks import thread_ranks

from samestep.cli import main
from samestep.errors import ConfigError, DataError, Interrupted, NotFiniteError, RolloutError
from samestep.train import rollouts, step_rollouts
from samestep.train.rewards import load_rewards
from samestep.train.rollouts import RolloutMaker
from samestep.train.setup import TrainingSetup, set_up
from samestep.train.trainer import train

REWARDS = """
import time

calls = []

def letters(completions, **columns):
    calls.append(len(completions))
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

def answered(prompts, completions, completion_ids, completion):
    assert len(set(prompts)) == len(set(completion)) == 1
    return [-len(ids) / 100 for ids in completion_ids]

def broken(prompts, completions):
    if "Emma" in prompts[0]:
        raise ValueError("no forks")
    return [0.0] * len(completions)

def slow(completions):
    time.sleep(5)

def nan(completions):
    return [0.0, float("nan")] + [1.0] * (len(completions) - 2)

def text(completions):
    return ["good"] * len(completions)

def one(completions):
    return [1.0]

def number(completions):
    return 1.0

def wanting(completions, solution):
    return [0.0] * len(completions)

def huge(completions):
    return [1e300 * at for at in range(len(completions))]

def enormous(completions):
    return [3e38] + [0.0] * (len(completions) - 1)

def polite(prompts, completions, answer):
    assert [each[-1]["role"] for each in prompts] == ["user"] * len(prompts)
    assert all(each[0]["role"] == "assistant" for each in completions)
    return [float(len(each[0]["content"])) for each in completions]

constant = 3
"""

GROUP = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts of ragged length, reward functions, and a run in ``alone``."""
    path = tmp_path_factory.mktemp("rollouts")
    llama_folder(path / "tiny", scale=4)
    write_rows(path / "rows.jsonl", 7)
    lines = read_lines(path / "rows.jsonl")
    lines[2] |= {"prompt": "How many forks were in the package that Emma bought? ", "weight": 2}
    (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    train(config(path, "alone"))
    return path


def config(folder: Path, out: str, rewards: str = "letters answered", **changes: Any) -> Any:
    """Four steps of three prompts; the third step is the short one of an epoch of seven rows."""
    settings: dict[str, Any] = {
        "objective": "policy",
        "reward_funcs": tuple(f"{folder / 'rewards.py'}:{name}" for name in rewards.split()),
        "num_generations": GROUP,
        "max_completion_length": 6,
        "precision": "float64",
        "steps": 4,
        "batch_size": 3,
        "lr": 1e-2,
        "optimizer": "sgd",
        "save_every": 2,
        **changes,
    }
    return run_config(folder, out=str(folder / out), **settings)


def weights(out: Path) -> dict[str, Any]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(out: Path, alone: Path) -> None:
    assert worst(weights(out), weights(alone)) < 1e-9
    assert_same_rollouts(out, alone)


def assert_same_rollouts(out: Path, alone: Path) -> None:
    found, wanted = read_lines(out / "rollouts.jsonl"), read_lines(alone / "rollouts.jsonl")
    advantages = [line.pop("advantage") for line in wanted]
    assert [line.pop("advantage") for line in found] == pytest.approx(advantages, abs=1e-9)
    assert found == wanted


def test_what_is_generated_and_logged(folder: Path) -> None:
    lines, steps = (read_lines(folder / "alone" / name) for name in ("rollouts.jsonl", "log.jsonl"))
    assert [line["sample"] for line in lines[:8]] == [1, 2, 3, 4] * 2
    numbers = [sum(line["step"] == step for line in lines) for step in (1, 2, 3, 4)]
    assert numbers == [3 * GROUP, 3 * GROUP, GROUP, 3 * GROUP]
    assert len({line["completion"] for line in lines}) > len(lines) // 2
    logged = {"reward": "reward", "completion_length": "tokens", "truncated": "truncated"}
    for report in steps:
        of_step = [line for line in lines if line["step"] == report["step"]]
        counted = [line for line in of_step for _ in range(1 + (line["row"] == "rows.jsonl:3"))]
        for name, key in logged.items():
            wanted = sum(line[key] for line in counted) / len(counted)
            assert report["terms"][name] == pytest.approx(wanted)
        assert report["counts"]["completion"] == len(counted)
        parts = [report["terms"][f"rewards/{name}"] for name in ("letters", "answered")]
        assert report["terms"]["reward"] == pytest.approx(sum(parts))
        assert report["terms"]["ratio"] == pytest.approx(1)
    # The whole of a group's advantage, by the formula of TRL's GRPOTrainer.
    rewards = torch.tensor([line["reward"] for line in lines], dtype=torch.float64).view(-1, GROUP)
    trl = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    found = torch.tensor([line["advantage"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(found, trl.flatten(), rtol=1e-9, atol=1e-9)


def test_no_split_changes_the_run(folder: Path) -> None:
    split = {"micro_tokens": 40, "padding": "left", "generation_batch": 1}
    train(config(folder, "split", **split))
    assert_same_run(folder / "split", folder / "alone")


def test_a_failed_reward_names_the_row_saves_the_run_and_goes_on(folder: Path) -> None:
    """The rewards of the third step fail; mended, the run is the one that never failed."""
    failing, text = folder / "failing.py", (folder / "rewards.py").read_text("utf-8")
    guard = "    if len(calls) > 6:\n        raise KeyError('a typo')\n    return"
    failing.write_text(text.replace("    return", guard, 1), "utf-8")
    names = tuple(f"{failing}:{name}" for name in ("letters", "answered"))
    lines = read_lines(folder / "alone" / "rollouts.jsonl")
    row = next(line["row"] for line in lines if line["step"] == 3)
    with pytest.raises(RolloutError) as caught:
        train(config(folder, "cut", reward_funcs=names))
    said = str(caught.value).splitlines()
    assert said[0] == f"reward_funcs: {row}: {names[0]} fails: KeyError: 'a typo'"
    assert said[1] == "The run is saved after step 2: go on with --resume"
    failing.write_text(text, "utf-8")
    train(config(folder, "cut", reward_funcs=names, resume=True))
    assert_same_run(folder / "cut", folder / "alone")


def test_a_signal_while_it_generates_saves_the_run(folder: Path) -> None:
    stopping, text = folder / "stopping.py", (folder / "rewards.py").read_text("utf-8")
    kill = "    if len(calls) > 6:\n        os.kill(os.getpid(), signal.SIGTERM)\n    return"
    stopping.write_text("import os, signal\n" + text.replace("    return", kill, 1), "utf-8")
    names = tuple(f"{stopping}:{name}" for name in ("letters", "answered"))
    with pytest.raises(Interrupted) as caught:
        train(config(folder, "stopped", reward_funcs=names))
    assert caught.value.step == 2
    stopping.write_text(text, "utf-8")
    train(config(folder, "stopped", reward_funcs=names, resume=True))
    assert_same_run(folder / "stopped", folder / "alone")


@pytest.fixture(scope="module")
def setup(folder: Path) -> TrainingSetup:
    return set_up(config(folder, "unused", generation_batch=1))


def maker(setup: TrainingSetup, **changes: Any) -> RolloutMaker:
    """One with a model of its own, so that ranks that are threads do not share it."""
    recipe: Any = setup.recipe
    settings = recipe.settings.model_copy(update=changes)
    model, tokenizer = copy.deepcopy(setup.model), copy.deepcopy(setup.tokenizer)
    return RolloutMaker(
        settings, model, tokenizer=tokenizer, prompts=setup.train, rewards=recipe._rewards
    )


def of_step(setup: TrainingSetup, *, ranks: int = 1, **changes: Any) -> list[Any]:
    """The rollouts that each rank gets for a step, as they are learned from."""

    def work(_: int) -> Any:
        made = maker(setup, **changes).of_step([5, 0, 2, 5], 3, beat=lambda name: None)
        return [
            (record.sequences[0].input_ids.tolist(), float(record.fields["advantage"]))
            for record in made.records
        ]

    if ranks == 1:
        return [work(0)]
    with thread_ranks(ranks) as world:
        return world.run(work)


def test_ranks_and_generation_batches_change_nothing(setup: TrainingSetup) -> None:
    (alone,) = of_step(setup)
    assert all(each == alone for each in of_step(setup, ranks=3))
    assert of_step(setup, generation_batch=3) == [alone]
    # A prompt that a mix takes twice gets other completions the second time.
    assert alone[:GROUP] != alone[-GROUP:]
    assert of_step(setup, seed=1) != [alone]


def test_noise_in_the_order_of_calls_is_caught(
    setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        rollouts,
        "sampling_keys",
        lambda seed, step, completions: torch.randint(
            0, 2**32, (2, len(completions)), generator=stream
        ),
    )
    assert of_step(setup) != of_step(setup, generation_batch=3)


def test_advantages_over_a_part_of_a_group_are_caught(
    setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    (right,) = of_step(setup)
    real = step_rollouts.advantages_of

    def in_parts(rewards: Any, groups: Any, *, baseline: Any) -> Any:
        halves = [f"{group} {at % 2}" for at, group in enumerate(groups)]
        return real(rewards, halves, baseline=baseline)

    monkeypatch.setattr(step_rollouts, "advantages_of", in_parts)
    (wrong,) = of_step(setup)
    assert [ids for ids, _ in wrong] == [ids for ids, _ in right]
    assert [each for _, each in wrong] != pytest.approx([each for _, each in right])


@pytest.mark.sampled(5)
@pytest.mark.parametrize("baseline", ["grpo", "dr_grpo", "rloo"])
def test_the_step_is_that_of_rows_that_bring_the_same_rollouts(
    folder: Path, setup: TrainingSetup, baseline: str
) -> None:
    common: dict[str, Any] = {"steps": 1, "baseline": baseline, "normalize": "token"}
    train(config(folder, "one", overwrite=True, **common, batch_size=7))
    lines = read_lines(folder / "one" / "rollouts.jsonl")
    order = [int(line["row"].partition(":")[2]) - 1 for line in lines[::GROUP]]
    made = maker(setup, baseline=baseline).of_step(order, 0, beat=lambda name: None)
    rows = [
        {
            "input_ids": record.sequences[0].input_ids.tolist(),
            "labels": record.sequences[0].labels.tolist(),
            "weight": record.sequences[0].weight,
            "reward": line["reward"],
            "group": line["row"],
        }
        for record, line in zip(made.records, lines, strict=True)
    ]
    given = folder / "given.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    common |= {"data": str(given), "num_generations": 8, "max_completion_length": 256}
    train(config(folder, "two", "", overwrite=True, **common, batch_size=len(rows)))
    assert worst(weights(folder / "one"), weights(folder / "two")) < 1e-9


def test_bits_are_kept_and_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"bitwise": True, "precision": "float32", "steps": 2, "threads": 1, "save_every": 1}
    train(config(folder, "bits", **settings))
    assert main(["verify", str(folder / "bits"), "--steps", "1..2"]) == 0
    assert "equal to the bit" in capsys.readouterr().out


BAD_REWARDS: dict[str, str] = {
    "broken": r"rows.jsonl:3: .*rewards.py:broken fails: ValueError: no forks",
    "slow": r"rows.jsonl:\d: .*rewards.py:slow takes longer than 0.05 s \(--reward-timeout\)",
    "nan": r"rows.jsonl:\d: .*rewards.py:nan returns nan for completion 2 ",
    "text": r"rows.jsonl:\d: .*:text returns 'good' for completion 1 .*must be a finite number",
    "one": r"rows.jsonl:\d: .*:one returns 1 numbers for 4 completions",
    "number": r"rows.jsonl:\d: .*:number returns 1.0; it must return a list of numbers",
    "huge": r"rows.jsonl:\d: reward 3e\+300 is too large",
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_bad_reward_names_the_row(folder: Path, setup: TrainingSetup, name: str) -> None:
    settings = config(folder, "unused", name, reward_timeout=0.05, batch_size=7)
    maker = RolloutMaker(
        settings,
        setup.model,
        tokenizer=setup.tokenizer,
        prompts=setup.train,
        rewards=load_rewards(settings),
    )
    with pytest.raises(RolloutError, match=BAD_REWARDS[name]):
        maker.of_step(range(7), 0, beat=lambda name: None)


def test_the_best_model_is_chosen_by_rewards_on_other_prompts(folder: Path) -> None:
    write_rows(folder / "held-out.jsonl", 5, seed=9)
    held_out = {"eval_data": str(folder / "held-out.jsonl"), "eval_every": 2, "best": "reward"}
    train(config(folder, "evaluated", **held_out))
    assert_same_rollouts(folder / "evaluated", folder / "alone")
    lines = read_lines(folder / "evaluated" / "eval.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(line["counts"]["completion"] == 5 * GROUP for line in lines)
    split = {"micro_batch": 1, "generation_batch": 2, "best": None, "steps": 1}
    train(config(folder, "evaluated-split", **held_out | split))
    again = read_lines(folder / "evaluated-split" / "eval.jsonl")[0]
    assert again["terms"] == pytest.approx(lines[0]["terms"], abs=1e-9)
    best = max(lines[1:], key=lambda line: line["terms"]["reward"])
    summary = json.loads((folder / "evaluated" / "summary.json").read_text("utf-8"))
    assert summary["best"] == {
        "metric": "reward",
        "step": best["step"],
        "value": best["terms"]["reward"],
    }


def test_a_completion_that_makes_the_loss_infinite_is_named(folder: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"At fault: rows.jsonl:\d, completion 1: policy is"):
        train(config(folder, "inf", "enormous", baseline="dr_grpo", precision="float32"))


def test_conversations_train_adapters(folder: Path) -> None:
    """In float32, from a distribution at another temperature, by one of two rewards."""
    user = {"role": "user", "content": "How many forks?"}
    rows = [{"prompt": [user] * (at % 2 + 1), "answer": at} for at in range(4)]
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    changes = {"lora_rank": 2, "kl_weight": 0.1, "temperature": 0.5, "precision": "float32"}
    train(config(folder, "chats", "polite", data=str(data), steps=2, **changes))
    lines = read_lines(folder / "chats" / "rollouts.jsonl")
    assert all(line["reward"] == len(line["completion"]) for line in lines)
    log = read_lines(folder / "chats" / "log.jsonl")
    assert log[0]["terms"]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["terms"]["kl"] > 0


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    r"no 'letter'; did you mean 'letters'\?": ("letter", {}),
    "constant is int, not a function": ("constant", {}),
    "needs 'solution', which no row has.*columns: completion, weight": ("wanting", {}),
    "baseline: given reads advantages of rows": ("letters", {"baseline": "given"}),
    "reward_weights: 2 for 1 reward_funcs": ("letters", {"reward_weights": (1.0, 2.0)}),
    "nothing is generated under parallel fsdp2": ("letters", {"parallel": "fsdp2"}),
    r"rows.jsonl:1: \d+ tokens of prompt": ("letters", {"max_completion_length": 250}),
    "(?s)batch_tokens: how long.*max_length: prompts are not cut": (
        "letters",
        {"max_length": 9, "batch_size": None, "batch_tokens": 9},
    ),
    "num_generations: 4 has no effect: rollouts are generated with reward_funcs": ("", {}),
    "best: .*; did you mean 'reward'": (
        "letters",
        {"eval_data": "HELD OUT", "best": "rewar", "best_is": "highest", "eval_every": 1},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_said_before_anything_is_written(folder: Path, message: str) -> None:
    rewards, changes = REFUSED[message]
    if "eval_data" in changes:
        changes = {**changes, "eval_data": str(folder / "rows.jsonl")}
    with pytest.raises((ConfigError, DataError), match=message):
        train(config(folder, "refused", rewards, **changes))
    assert not (folder / "refused").exists()


def test_a_dry_run_says_what_would_be_generated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(folder, "dry").saved()
    file = folder / "dry.yaml"
    given = {name: value for name, value in settings.items() if value is not None}
    file.write_text(json.dumps(given), "utf-8")
    assert main(["train", str(file), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 completions of each prompt, of 6 tokens at most" in said
    assert "4 steps of 3 prompts (12 completions)" in said
    assert not (folder / "dry").exists()
    assert "to generate and reward its rollouts" in said
