import pytest
from study_results import make_arm, make_results

from samestep.study.comparison import compare_arms, summarise
from samestep.study.recommendation import recommend
from samestep.study.results import ArmResult, NoiseSums
from samestep.study.statistics import batch_size_advice, mean_interval, ratio_interval

REFERENCE = make_arm("32 x 1", {0: 3.0, 1: 3.1, 2: 2.9}, reference=True, split="32 x 1")


def verdict(arm: ArmResult, reference: ArmResult = REFERENCE) -> tuple[str, str, bool | None]:
    (found,) = compare_arms(make_results([reference, arm]))
    return found.outcome, found.verdict, found.same_step


def test_the_same_step_with_the_same_result() -> None:
    arm = make_arm("1 x 32", {0: 3.0 + 1e-7, 1: 3.1, 2: 2.9 - 1e-7}, difference=2e-7)
    outcome, words, same = verdict(arm)
    assert (outcome, same) == ("unresolved", True)
    assert words.startswith("Same step: at the same weights its gradient differs")
    assert "2.0e-07" in words


@pytest.mark.parametrize(
    ("shift", "outcome", "words"),
    [
        (0.5, "worse", "It trained worse: evaluation loss +0.5000"),
        (-0.5, "better", "It trained better"),
        (0.05, "small", "by less than seeds differ"),
    ],
)
def test_a_difference_is_measured_by_the_noise_between_seeds(
    shift: float, outcome: str, words: str
) -> None:
    finals = {0: 3.0 + shift, 1: 3.101 + shift, 2: 2.899 + shift}
    arm = make_arm("bug", finals, difference=0.4, normalisation="mean-of-means")
    found, text, same = verdict(arm)
    assert (found, same) == (outcome, False)
    assert words in text
    assert "Different step, because each micro-batch is divided by its own number" in text
    assert "off by up to 40%" in text
    assert "seeds of the reference differ by 0.1000" in text


def test_seeds_that_disagree_resolve_nothing() -> None:
    arm = make_arm("bug", {0: 3.5, 1: 2.9, 2: 3.0}, difference=0.4, normalisation="sum")
    assert verdict(arm)[0] == "unresolved"


def test_one_seed_makes_no_claim_about_noise() -> None:
    reference = make_arm("32 x 1", {0: 3.0}, reference=True)
    outcome, words, _ = verdict(make_arm("bug", {0: 9.0}, difference=0.4), reference)
    assert outcome == "one seed"
    assert "one seed: no claim about noise" in words


def test_diverged_runs_are_left_out_and_counted() -> None:
    arm = make_arm("bug", {0: 3.5, 1: 3.6, 2: 3.4}, difference=0.4, normalisation="sum")
    runs = [arm.runs[0].model_copy(update={"diverged": "after 2 updates: nan"}), *arm.runs[1:]]
    _, words, _ = verdict(arm.model_copy(update={"runs": runs}))
    assert "1 of 3 runs diverged and are left out" in words
    assert "over 2 paired seeds" in words
    all_gone = [run.model_copy(update={"diverged": "x"}) for run in arm.runs]
    outcome, words, _ = verdict(arm.model_copy(update={"runs": all_gone}))
    assert outcome == "diverged"
    assert "3 of 3" in words


def test_without_an_exact_arm_only_gradients_are_judged() -> None:
    (found,) = compare_arms(make_results([make_arm("bug", {0: 3.0}, difference=0.4)]))
    assert found.outcome == "no reference"
    assert found.same_step is False


def test_what_counts_as_rounding_depends_on_the_type() -> None:
    arm = make_arm("1 x 32", {0: 3.0}, difference=1e-6)
    for dtype, same in (("float32", True), ("float64", False)):
        (found,) = compare_arms(make_results([arm], dtype=dtype))
        assert found.same_step is same


def test_advice_is_in_examples_and_from_the_finest_exact_arm() -> None:
    noise = NoiseSums(signal=[0.1, 0.11, 0.09], variance=[100.0, 101.0, 99.0])
    fine = make_arm("1 x 32", {0: 3.0}, of_run={"noise": noise})
    coarse = make_arm(
        "8 x 4",
        {0: 3.0},
        split="8 x 4",
        of_run={"noise": NoiseSums(signal=[9.0] * 3, variance=[1] * 3)},
    )
    (advice,) = batch_size_advice(make_results([coarse, fine]))
    # 1,000 targets; a batch of 32 examples holds 100 targets on average.
    assert advice.noise_scale.value == pytest.approx(1000 / (100 / 32))
    assert advice.steps == 3
    # (1 + 320 / 16) / (1 + 320 / 32) and (1 + 320 / 64) / (1 + 320 / 32)
    assert "half the batch 1.91 times the steps and 0.95 times the examples" in advice.text
    assert "twice the batch 0.55 times the steps and 1.09 times the examples" in advice.text
    assert batch_size_advice(make_results([make_arm("x", {0: 1.0})])) == []


def test_a_study_is_told_in_short() -> None:
    bug = {"normalisation": "mean-of-means"}
    other = {"group": "other rows", **bug}
    sentences = summarise(
        make_results(
            [
                REFERENCE,
                make_arm("1 x 32", {0: 3.0, 1: 3.1, 2: 2.9}, difference=2e-7),
                make_arm("bug", {0: 3.5, 1: 3.601, 2: 3.4}, difference=0.4, **bug),
                REFERENCE.model_copy(update={"group": "other rows"}),
                make_arm("bug", {0: 3.5, 1: 2.6, 2: 3.0}, difference=40.0, **other),
            ]
        )
    )
    assert sentences == [
        "1 x 32: the same step as the undivided batch (gradient within 2e-07).",
        "bug: gradient off by 40% to 40 times; trained worse in 1 of 2 groups, no difference "
        "after training that these seeds show in 1 of 2 groups.",
    ]


def test_a_study_gives_advice_that_its_runs_show() -> None:
    fast = {"tokens_per_second": 3000.0}
    bug = {"normalisation": "mean-of-means"}
    exact = make_arm("1 x 32", {0: 3.0, 1: 3.1, 2: 2.9}, difference=2e-7, of_run=fast)
    worse = make_arm("bug", {0: 3.5, 1: 3.601, 2: 3.4}, difference=0.4, **bug)
    advice = recommend(make_results([REFERENCE, exact, worse]))
    assert "32 x 1, 1 x 32 take the same step" in advice
    assert "1 x 32 was the fastest (3,000 tokens/s)" in advice
    assert "Keep away from bug" in advice
    assert "bug trained worse than the noise between seeds" in advice
    unresolved = make_arm("bug", {0: 3.5, 1: 2.6, 2: 3.0}, difference=0.4, **bug)
    assert "these runs do not show" in recommend(make_results([REFERENCE, unresolved]))
    assert recommend(make_results([REFERENCE])).startswith("No advice")


def test_intervals_match_worked_values() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / 3**0.5)  # t(2) * 1 / sqrt(3)
    # With an exact denominator Fieller's interval is Student's, divided.
    ratio = ratio_interval([1.0, 2.0, 3.0], [4.0, 4.0, 4.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (0.5, max(0.0, found.low / 4), found.high / 4)
    )
