import inspect
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from cases import build
from hypothesis import given
from hypothesis import strategies as st

from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.recipes.base import recipe_for
from samestep.train.recipes.language import CausalLMRecipe
from samestep.train.settings.base import RESUME_MAY_CHANGE, TrainSettings, finalize
from samestep.train.settings.language import CausalLMSettings
from samestep.train.settings.objectives import OBJECTIVES, PolicySettings, settings_class

NEEDED = ["--model", "m", "--data", "d", "--out", "o"]


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_alone_give_sane_defaults() -> None:
    config = read_settings(NEEDED)
    assert (config.batch_size, config.epochs, config.steps) == (32, 1, None)
    assert config.normalize == "token"
    assert config.max_grad_norm == 1.0


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\ndata: d\nout: o\nlr: 1e-3\nbatch-size: 4\n")
    config = read_settings([path, "--model", "b", "--batch-size", "2"])
    assert (config.model, config.data, config.lr, config.batch_size) == ("b", "d", 1e-3, 2)


def test_required_fields_may_come_from_either_side(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\n")
    assert read_settings([path, "--data", "d", "--out", "o"]).model == "a"
    with pytest.raises(ConfigError, match="lacks data, out"):
        read_settings([path])


@pytest.mark.parametrize("value", ["token", "sequence", "128"])
def test_normalize_takes_a_unit_or_a_constant(value: str) -> None:
    config = read_settings([*NEEDED, "--normalize", value])
    assert config.normalize == (128.0 if value == "128" else value)


def test_every_problem_of_a_file_is_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nlerning_rate: 1\nlabel_smooting: 0.1\nlr: fast\nsteps: 0\n")
    with pytest.raises(ConfigError) as error:
        read_settings([path])
    message = str(error.value)
    assert "lerning_rate: no such field" in message
    assert "did you mean 'label_smoothing'?" in message
    assert "lr:" in message
    assert "'fast'" in message
    assert "steps:" in message


def test_every_contradiction_is_in_one_message() -> None:
    both = ["--batch-size", "4", "--batch-tokens", "9", "--steps", "1", "--epochs", "1"]
    with pytest.raises(ConfigError, match=r"batch_tokens(.|\n)*epochs"):
        read_settings([*NEEDED, *both])


@pytest.mark.parametrize(
    "flags",
    [
        ["--micro-batch", "2", "--micro-tokens", "64"],
        ["--micro-tokens", "0"],
        ["--normalize", "-3"],
        ["--normalize", "inf"],
        ["--resume", "--overwrite"],
        ["--merge"],
        ["--lora-dropout", "0.1"],
        ["--activation-offload", "--gradient-checkpointing", "full"],
    ],
)
def test_contradictions_are_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_settings([*NEEDED, *flags])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n", "just words"])
def test_files_that_are_no_settings_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_settings([write(tmp_path, text)])


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_settings(["nowhere.yaml"])


def test_lora_alpha_is_twice_the_rank() -> None:
    assert read_settings([*NEEDED, "--lora-rank", "8"]).lora_alpha == 16


def test_what_may_change_on_resume_are_fields() -> None:
    fields = {*CausalLMSettings.model_fields, *PolicySettings.model_fields}
    assert fields >= RESUME_MAY_CHANGE


@given(
    st.fixed_dictionaries(
        {"model": st.just("m"), "data": st.just("d"), "out": st.just("o")},
        optional={
            "batch_size": st.integers(1, 64),
            "steps": st.integers(1, 10**6),
            "lr": st.floats(1e-9, 1.0),
            "normalize": st.sampled_from(["token", "sequence"]) | st.floats(0.5, 1e6),
            "micro_tokens": st.just("auto") | st.integers(1, 9999),
            "lora_targets": st.just(("q_proj", "v_proj")) | st.just(("all-linear",)),
            "seed": st.integers(0, 2**32),
        },
    )
)
def test_saved_settings_read_back_the_same(values: dict[str, object]) -> None:
    values = values if "lora_targets" not in values else {**values, "lora_rank": 4}
    config = finalize(CausalLMSettings.model_validate(values))
    again = CausalLMSettings.model_validate(yaml.safe_load(yaml.safe_dump(config.saved())))
    assert again == config


@given(
    st.dictionaries(
        st.sampled_from([*CausalLMSettings.model_fields, "nonsense", ""]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)
def test_any_yaml_is_a_config_or_a_clear_error(values: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), yaml.safe_dump(values))
        try:
            read_settings([path, *NEEDED])
        except (ConfigError, SystemExit) as error:
            assert str(error).strip() not in ("", "0")


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, True),
        ({"gradient_checkpointing": "none"}, False),
        ({"activation_offload": True}, False),
    ],
)
def test_layers_are_computed_anew_under_auto_alone(
    settings: dict[str, object], changed: bool
) -> None:
    recipe = CausalLMRecipe(CausalLMSettings(model="m", data="d", out="o", **settings))
    model = build("llama")
    assert recipe.recompute_activations(model) == changed
    assert model.is_activation_checkpointing == changed
    assert not recipe.recompute_activations(model)  # there is no less than that


def test_settings_need_no_pytorch() -> None:
    """Importing every module of settings, and the commands that read them, leaves PyTorch out."""
    code = (
        "import pkgutil, sys\n"
        "from importlib import import_module\n"
        "from samestep.train import settings\n"
        "names = [found.name for found in pkgutil.iter_modules(settings.__path__)]\n"
        "modules = [import_module(f'samestep.train.settings.{name}') for name in names]\n"
        "import samestep.train.command, samestep.train.optim\n"
        "print(len(names), [name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, loaded = done.stdout.split(" ", 1)
    assert int(number) >= 3
    assert loaded.strip() == "[]"


def test_settings_do_nothing() -> None:
    """Fields and their contradictions alone: what acts is in the recipes."""
    allowed = {"problems", "saved"}
    for row in OBJECTIVES.values():
        for kind in row.settings.__mro__:
            if issubclass(kind, TrainSettings):
                methods = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
                assert {name for name in methods if name[0] != "_"} <= allowed


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_recipe_for_its_settings(objective: str) -> None:
    settings = settings_class(objective)(model="m", data="d", out="o")
    recipe = recipe_for(settings)
    assert recipe.settings is settings
    assert get_type_hints(type(recipe))["settings"] is type(settings)


def test_a_renamed_field_says_its_new_name(tmp_path: Path) -> None:
    path = write(tmp_path, "objective: reward\nmodel: a\ncentring: 0.1\n")
    with pytest.raises(ConfigError, match="centring: no such field; it is called 'center_rewards'"):
        read_settings([path])
    with pytest.raises(ConfigError, match="--centring: no such flag; it is called --center"):
        read_settings([*NEEDED, "--objective", "reward", "--centring", "0.1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "adamv"], "should be 'adamw'.*did you mean 'adamw'"),
        (["--schedule", "cosin"], "should be 'linear'.*did you mean 'cosine'"),
        (["--objective", "dpp"], "did you mean 'dpo'"),
        (["--objective", "none.py:loss"], "objective: there is no file none.py"),
        (["--objective", "no.such.module:loss"], "there is no module 'no.such.module'"),
    ],
)
def test_a_name_in_no_table_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings([*NEEDED, *flags])
