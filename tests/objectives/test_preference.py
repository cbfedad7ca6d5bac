"""DPO's family, SimPO, CPO, ORPO: TRL's or the paper's values, under every split."""

import copy
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import build, gradients, worst
from torch import Tensor
from torch.nn.functional import logsigmoid

import samestep
from objectives import (
    SPLITS,
    check_all_splits,
    check_wrong_is_caught,
    cut,
    log_probs,
    ragged_records,
    side_by_side,
)
from samestep.data.examples import Example
from samestep.data.records import Records
from samestep.engine.terms import Objective
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError
from samestep.objectives.log_probs import Reference
from samestep.objectives.preference import DPO, ReferenceFree
from samestep.objectives.units import PAIR_COUNTERS

BETA, EPSILON = 0.3, 0.125
FEW = [SPLITS[1], SPLITS[3]]
LOSSES = (
    *("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "aot", "aot_unpaired", "sft"),
)


def reference() -> Any:
    """The policy with every weight moved a little."""
    other = copy.deepcopy(build("llama"))
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, dtype=weight.dtype))
    return other


def sides(model: Any, records: Records, of: Any = log_probs) -> tuple[Tensor, Tensor]:
    """Log likelihoods of targets, chosen sequences first [2 x pairs, longest], and their mask."""
    sequences = list(records.sequences)
    return side_by_side([of(model, one) for one in sequences[::2] + sequences[1::2]])


def of_trl(
    kinds: dict[str, float],
    policy: Tensor,
    ref: Tensor,
    mask: Tensor,
    collisions: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """What TRL's own `DPOTrainer._compute_loss` makes of these log likelihoods."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def gather(tensor: Tensor) -> Tensor:
        return tensor

    def model(**_: Any) -> Any:
        like = torch.zeros_like(policy)
        return SimpleNamespace(
            log_probs=policy,
            log_sum_sq_probs=collisions,
            entropy=like,
            mean_logits=like,
            is_top1=mask,
        )

    trained: Any = torch.nn.Module().eval()
    trained.is_gradient_checkpointing = False
    fake = SimpleNamespace(
        model=trained,
        ref_model=lambda **_: SimpleNamespace(log_probs=ref),
        accelerator=SimpleNamespace(device="cpu", gather=gather, gather_for_metrics=gather),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=BETA,
        loss_types=list(kinds),
        loss_weights=list(kinds.values()),
        **{
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "use_weighting": False,
            "label_smoothing": EPSILON,
            **options,
        },
    )
    with_prompt = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(with_prompt, dtype=torch.long),
        "completion_mask": with_prompt.long(),
    }
    loss: Tensor = DPOTrainer._compute_loss(fake, model, inputs, return_outputs=False)
    return loss


def collision_chances(model: Any, example: Example) -> Tensor:
    """Log sum p² of the distribution of each target [targets], from whole logits."""
    chosen = example.labels[1:] != -100
    logits = model(input_ids=example.input_ids[None]).logits[0, :-1][chosen]
    return logits.softmax(-1).square().sum(-1).log()


def trl_truth(
    records: Records,
    kinds: dict[str, float],
    other: Any,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Callable[[Any], Tensor]:
    def truth(model: Any) -> Tensor:
        policy, mask = sides(model, records)
        with torch.no_grad():
            ref, _ = sides(other, records)
            chances, _ = sides(model, records, collision_chances)
        return of_trl(kinds, policy.to(dtype), ref.to(dtype), mask, chances, **options)

    return truth


def dpo(kinds: dict[str, float], other: Any, **options: Any) -> Objective:
    smoothing = options.pop("label_smoothing", EPSILON)
    loss = DPO(kinds, Reference(other), beta=BETA, label_smoothing=smoothing, **options)
    return Objective(TwoPass(loss) if loss.coupled else loss, PAIR_COUNTERS)


def kinds_of(name: str) -> dict[str, float]:
    return {"mixture": {"robust": 0.7, "aot": 0.5, "sft": 0.2}}.get(name, {name: 1.0})


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [*(n for n in LOSSES if n != "sigmoid"), "mixture"])
def test_dpo_is_trls_under_every_split(name: str) -> None:
    model, other, records = build("llama"), reference(), ragged_records(7, width=2)
    kinds = kinds_of(name)
    truth = trl_truth(records, kinds, other)
    # TRL has the logarithms of exo_pair's constants in float32.
    bound = 1e-6 if name == "exo_pair" else 1e-12
    check_all_splits(model, records, dpo(kinds, other), truth, bound=bound)
    check_wrong_is_caught(model, records, dpo(kinds, other), truth)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kinds", "ours", "theirs"),
    [
        (["sigmoid_norm"], {}, {}),
        (["sigmoid"], {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
        (["hinge"], {"divergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
        (["ipo"], {"divergence": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
        (["sigmoid", "sft"], {"tail_weight": 0.3}, {"ld_alpha": 0.3}),
        (["ipo"], {"tail_weight": 0.0}, {"ld_alpha": 0.0}),
        (["aot_unpaired", "aot"], {"tail_weight": 0.3}, {"ld_alpha": 0.3}),
        (["apo_zero"], {"on_policy_weights": True}, {"use_weighting": True}),
        (
            ["sigmoid_norm"],
            {"divergence": "js_divergence", "tail_weight": 0.5, "on_policy_weights": True},
            {"f_divergence_type": "js_divergence", "ld_alpha": 0.5, "use_weighting": True},
        ),
    ],
    ids=str,
)
def test_variants_are_trls_under_every_split(kinds: list[str], ours: Any, theirs: Any) -> None:
    """TRL's "sigmoid" and "sigmoid_norm" know no label smoothing."""
    model, other, records = build("llama"), reference(), ragged_records(7, width=2)
    mixture = dict.fromkeys(kinds, 1.0)
    truth = trl_truth(records, mixture, other, label_smoothing=0.0, **theirs)
    objective = dpo(mixture, other, label_smoothing=0.0, **ours)
    check_all_splits(model, records, objective, truth, splits=FEW)
    check_wrong_is_caught(model, records, objective, truth)


@pytest.mark.parametrize("coefficient", [0.0, 0.4, 1.0])
def test_alpha_divergence_is_trls(coefficient: float) -> None:
    """TRL has it in float32; exactly it is the derivative of the paper's f, taken here."""
    model, other, records = build("llama"), reference(), ragged_records(7, width=2)
    options = {"divergence": "alpha_divergence", "divergence_coefficient": coefficient}
    objective = dpo({"sigmoid": 1.0}, other, label_smoothing=0.0, **options)
    theirs = trl_truth(
        *(records, {"sigmoid": 1.0}, other),
        dtype=torch.float32,
        label_smoothing=0.0,
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=coefficient,
    )
    check_all_splits(model, records, objective, theirs, bound=1e-4, splits=FEW[:1])
    ours = divergence_truth(records, other, 1 - coefficient)
    check_all_splits(model, records, objective, ours, splits=FEW)


def divergence_truth(records: Records, other: Any, alpha: float) -> Callable[[Any], Tensor]:
    """-log s(beta (f'(u_w) - f'(u_l))) with the f of the table of arXiv:2309.16240."""

    def f(u: Tensor) -> Tensor:
        if alpha == 0:
            return u * u.log()
        if alpha == 1:
            return -u.log()
        return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))

    def truth(model: Any) -> Tensor:
        policy, mask = sides(model, records)
        with torch.no_grad():
            ref, _ = sides(other, records)
        ratios = ((policy - ref) * mask).sum(1).exp()
        (slopes,) = torch.autograd.grad(f(ratios).sum(), ratios, create_graph=True)
        chosen, rejected = slopes.chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()

    return truth


def test_weights_of_pairs_have_no_gradient_and_stand_beside_those_of_rows() -> None:
    model, other = build("gpt2"), copy.deepcopy(build("gpt2"))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.1)
    records = ragged_records(7, width=2, weighted=True)

    def truth(model: Any) -> Tensor:
        policy, mask = sides(model, records)
        with torch.no_grad():
            ref, _ = sides(other, records)
            chances, _ = sides(model, records, collision_chances)
            each = (((policy - chances) * mask).sum(1) / mask.sum(1)).exp()
        chosen, rejected = ((policy - ref) * mask).sum(1).chunk(2)
        of_rows = torch.tensor([one.sequences[0].weight for one in records], dtype=ref.dtype)
        weights = of_rows * each[: len(of_rows)] * each[len(of_rows) :]
        return -(weights * logsigmoid(BETA * (chosen - rejected))).sum() / of_rows.sum()

    objective = dpo({"sigmoid": 1.0}, other, label_smoothing=0.0, on_policy_weights=True)
    terms = check_all_splits(model, records, objective, truth, splits=FEW)
    assert 0 < terms["pair_weight"] < 1


def sigmoid_truth(
    records: Records, other: Any, *, smoothing: float = 0.0, normalize: bool = False
) -> Callable[[Any], Tensor]:
    """The formulas of DPO and cDPO; weights as of the records."""

    def truth(model: Any) -> Tensor:
        total, weights = torch.zeros(()).double(), 0.0
        for record in records:
            ratios = []
            for sequence in record.sequences:
                with torch.no_grad():
                    ref = log_probs(other, sequence)
                ratio = log_probs(model, sequence) - ref
                ratios.append(ratio.mean() if normalize else ratio.sum())
            margin = BETA * (ratios[0] - ratios[1])
            weight = record.sequences[0].weight
            total = total - weight * (1 - smoothing) * logsigmoid(margin)
            total = total - weight * smoothing * logsigmoid(-margin)
            weights += weight
        return total / weights

    return truth


@pytest.mark.sampled(3)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_sigmoid_with_weights(name: str, smoothing: float, normalize: bool) -> None:
    model, records = build(name), ragged_records(7, width=2, weighted=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.1)
    loss = DPO(
        {"sigmoid": 1.0},
        Reference(other),
        beta=BETA,
        label_smoothing=smoothing,
        length_normalize=normalize,
    )
    truth = sigmoid_truth(records, other, smoothing=smoothing, normalize=normalize)
    terms = check_all_splits(model, records, Objective(loss, PAIR_COUNTERS), truth)
    assert terms["margin"] == pytest.approx(terms["reward_chosen"] - terms["reward_rejected"])
    assert 0 < terms["accuracy"] < 1


@pytest.mark.parametrize("kinds", [{"sigmoid": 1.0}, {"aot": 1.0, "sft": 0.1}], ids=str)
def test_float32(kinds: dict[str, float]) -> None:
    model, records = build("llama").float(), ragged_records(7, width=2)
    loss = dpo(kinds, reference().float()).loss_fn
    found = []
    for sizes, padding in (([7], "right"), ([1], "none"), ([3, 2], "left")):
        micros = cut(model, records, sizes, padding)
        samestep.backward(model, micros, loss, counters=PAIR_COUNTERS)
        found.append(gradients(model))
    assert max(worst(one, found[0]) for one in found[1:]) < 2e-6


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_aot_refuses_weights(kind: str) -> None:
    model, records = build("llama"), ragged_records(3, width=2, weighted=True)
    loss = dpo({kind: 1.0}, reference()).loss_fn
    with pytest.raises(ConfigError, match="aot compares sorted margins"):
        samestep.backward(model, cut(model, records, [3], "right"), loss, counters=PAIR_COUNTERS)


def free_truth(records: Records, kind: str, name: str) -> Callable[[Any], Tensor]:
    """CPO's, SimPO's and ORPO's objective with TRL's own loss functions for the preference."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    def truth(model: Any) -> Tensor:
        log_p, mask = sides(model, records)
        sums = log_p.sum(1)
        nll = -sums[: len(records)].sum() / mask[: len(records)].sum()
        chosen, rejected = (sums if kind == "cpo" else sums / mask.sum(1)).chunk(2)
        fake = SimpleNamespace(
            alpha=0.0,
            beta=BETA,
            loss_type="simpo" if kind == "simpo" else name,
            simpo_gamma=0.4,
            label_smoothing=0.0,
            accelerator=SimpleNamespace(device="cpu"),
        )
        if kind == "orpo":
            # The odds ratio alone: TRL's is in float32, so its formula is written out here.
            odds = [p - torch.log1p(-p.exp()) for p in (chosen, rejected)]
            losses = -BETA * logsigmoid(odds[0] - odds[1])
            theirs = -ORPOTrainer.odds_ratio_loss(fake, chosen, rejected)[0]
            torch.testing.assert_close(losses.float(), theirs)
            return losses.mean() + nll
        losses = CPOTrainer.cpo_loss(fake, chosen, rejected)[0]
        return losses.mean() + 0.5 * nll

    return truth


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("simpo", "sigmoid"),
        ("cpo", "sigmoid"),
        ("cpo", "hinge"),
        ("cpo", "ipo"),
        ("orpo", "sigmoid"),
    ],
)
def test_reference_free_losses(kind: Any, name: Any) -> None:
    model, records = build("qwen2"), ragged_records(7, width=2)
    weight = 1.0 if kind == "orpo" else 0.5
    gamma = 0.4 if kind == "simpo" else 0.0
    loss = ReferenceFree(kind, beta=BETA, loss=name, gamma=gamma, nll_weight=weight)
    objective, truth = Objective(loss, PAIR_COUNTERS), free_truth(records, kind, name)
    terms = check_all_splits(model, records, objective, truth)
    assert terms["nll"] > 0
    check_wrong_is_caught(model, records, objective, truth)


def test_odds_of_a_certain_token_stay_finite() -> None:
    from samestep.losses.preference import odds_ratio_loss

    certain = torch.tensor([0.0, -1e-9], requires_grad=True)
    loss = odds_ratio_loss(certain, torch.tensor([-1.0, -1.0])).sum()
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(certain.grad.isfinite().all())


def test_the_reference_of_an_adapter_is_the_model_without_it() -> None:
    from peft import LoraConfig, get_peft_model

    base = build("llama")
    records = ragged_records(6, width=2)
    options = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5}
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(**options, init_lora_weights=False)
    ).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # the policy without dropout too: the truth knows none
    loss = Objective(DPO({"sigmoid": 1.0}, Reference(None), beta=BETA), PAIR_COUNTERS)
    check_all_splits(model, records, loss, sigmoid_truth(records, base))
    assert model.training
