"""Whole runs of each objective, tiny."""

from pathlib import Path
from typing import Any

from diffusion import video_folder, write_latents
from experts import FAMILIES, experts_folder
from objective_rows import write_rows_of
from runs import bert_folder, llama_folder, run_config, t5_folder
from vision import got_folder, write_illustrated_rows

CASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "causal_lm mixtral": ({"router_loss": "window"}, "nll", False),
    "causal_lm deepseek_v3": (
        {"router_loss": "sequence", "router_z_loss": 1e-3, "router_bias_rate": 0.01},
        "nll",
        False,
    ),
    "causal_lm dft": ({"loss": "dft"}, "nll", False),
    "dpo": ({"beta": 0.5}, "margin", True),
    "dpo mixture": ({"loss": ("aot", "sft"), "loss_weights": (1, 0.1)}, "margin", True),
    "simpo": ({}, "margin", True),
    "cpo": ({}, "margin", True),
    "orpo": ({}, "nll", False),
    "kto": ({"beta": 0.5}, "kto", False),
    "kto once": ({"precompute_reference": True}, "reward_undesirable", False),
    "policy": ({"baseline": "rloo", "normalize": "token"}, "score", True),
    "policy kl": ({"kl_weight": 0.1, "ratio": "sequence"}, "score", True),
    "distillation": ({"divergence": "jensen_shannon", "lr": 1e-3}, "divergence", False),
    "distillation kl": ({"temperature": 2.0}, "divergence", False),
    "distillation taught": ({}, "divergence", False),
    "reward": ({"center_rewards": 0.01}, "accuracy", True),
    "classification": ({"lr": 3e-2}, "accuracy", True),
    "classification bert": ({"lr": 3e-3}, "cross_entropy", False),
    "regression": ({}, "squared_error", False),
    "token_classification": ({}, "accuracy", True),
    "embedding": ({"temperature": 0.2}, "contrastive", False),
    "embedding bert": ({"symmetric": True}, "contrastive", False),
    "masked_lm bert": ({}, "nll", False),
    "seq2seq t5": ({"label_smoothing": 0.1}, "nll", False),
    "question_answering bert": ({}, "cross_entropy", False),
}
"""Objective and model: settings, the metric that must move as it learns, and whether up."""

SIZES = {"data": 32, "eval_data": 12}


def configured(folder: Path, case: str, **changes: Any) -> Any:
    """A run of a case, whose model and rows lie in the folder from then on."""
    objective, settings = case.split()[0], CASES[case][0]
    kind = case.split()[-1]
    if kind in FAMILIES:
        settings = {**settings, "model": str(experts_folder(folder / kind, kind))}
    if objective == "distillation" and kind != "taught":
        llama_folder(folder / "teacher", seed=1, scale=20)
        settings = {**settings, "teacher": str(folder / "teacher")}
    if kind == "t5":
        settings = {**settings, "model": str(t5_folder(folder / kind))}
    if "bert" in case:
        settings = {**settings, "model": str(bert_folder(folder / "bert"))}
    data = {
        name: write_rows_of(
            kind if kind == "taught" else objective, folder / f"{name}.jsonl", number, seed=number
        )
        for name, number in SIZES.items()
    }
    return run_config(folder, objective=objective, **{**data, **settings, **changes})


def pictures(folder: Path, **changes: Any) -> Any:
    """A run of vision_language."""
    model = got_folder(folder / "got")
    data = write_illustrated_rows(folder, 12, plain=5)
    return run_config(
        folder, objective="vision_language", **{"model": str(model), "data": str(data), **changes}
    )


def latents(folder: Path, **changes: Any) -> Any:
    """A run of flow_matching."""
    model, data = video_folder(folder / "video"), write_latents(folder / "latents", 12)
    return run_config(
        folder, objective="flow_matching", **{"model": str(model), "data": str(data), **changes}
    )
