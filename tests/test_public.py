"""The public surface: what is exported, documented and cheap to import."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import samestep
from samestep import errors

PUBLIC = [
    "Axis",
    "Bitwise",
    "Callback",
    "CausalLMLoss",
    "Cause",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "Coupled",
    "DataError",
    "Diagnosis",
    "EvalReport",
    "FitResult",
    "Idle",
    "Measurement",
    "NotFiniteError",
    "Objective",
    "OutOfMemoryError",
    "SamestepError",
    "StepError",
    "StepReport",
    "Term",
    "TwoPass",
    "__version__",
    "assert_same_step",
    "backward",
    "check",
    "constant",
    "evaluate",
    "fit",
    "linear_cross_entropy",
    "model_inputs",
    "step",
    "target_weights",
    "windows",
]
"""Every public name: a change here is a change for users, and stands in CHANGELOG.md."""

FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(samestep, name))]
CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(samestep, name))]
RAISE_NOTHING = {"model_inputs"}


def test_the_public_names_are_these() -> None:
    assert samestep.__all__ == PUBLIC == dir(samestep)
    assert {*FUNCTIONS, *CLASSES, "__version__"} == set(PUBLIC)
    with pytest.raises(AttributeError, match="no_such_name"):
        samestep.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_document_arguments_results_and_errors(name: str) -> None:
    function = getattr(samestep, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^\s+{argument}: ", text, re.MULTILINE), f"{name}: {argument}"
    assert "Raises:" in text or name in RAISE_NOTHING, name
    if inspect.signature(function).return_annotation is not None:
        assert "Returns:" in text, name


@pytest.mark.parametrize("name", CLASSES)
def test_classes_document_their_fields(name: str) -> None:
    kind = getattr(samestep, name)
    text = inspect.getdoc(kind) or ""
    assert len(text) > 20, name
    for field in getattr(kind, "__dataclass_fields__", ()):
        assert re.search(rf"^\s+{field}: ", text, re.MULTILINE), f"{name}: {field}"


def test_the_annotations_for_type_checkers_name_the_same() -> None:
    source = Path(samestep.__file__).read_text(encoding="utf-8")
    typed = set(re.findall(r"^    from samestep\S+ import (\w+) as \1$", source, re.MULTILINE))
    assert typed == set(samestep._HOME)


def test_importing_the_package_loads_no_pytorch() -> None:
    code = "import sys, samestep; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_public_name_is_in_the_api_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: samestep\.(\w+)$", page, re.MULTILINE)
    assert sorted([*described, "__version__"]) == sorted([*PUBLIC, "errors"])


def test_the_picture_of_the_errors_is_that_of_the_classes() -> None:
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (inspect.getdoc(errors) or "").splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+)(  |$)", line)
        if found is None or not line.startswith("    "):
            continue
        depth, name = len(found[1]), found[2]
        above = [(column, parent) for column, parent in above if column < depth]
        drawn[name] = above[-1][1] if above else ""
        above.append((depth, name))
    classes = {
        name: kind.__bases__[0].__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
    }
    assert drawn == {**classes, "SamestepError": "", "KeyboardInterrupt": ""}


def test_there_is_one_version() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dynamic = \["version"\]$', project, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", samestep.__version__)
    changes = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)[0]
    assert newest == samestep.__version__
