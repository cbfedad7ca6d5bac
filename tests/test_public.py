"""The public surface: what is exported, documented and cheap to import."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import samestep

FUNCTIONS = [name for name in samestep.__all__ if inspect.isfunction(getattr(samestep, name))]
RAISE_NOTHING = {"model_inputs"}
CLASSES = [name for name in samestep.__all__ if inspect.isclass(getattr(samestep, name))]


def test_every_public_name_exists() -> None:
    assert sorted(samestep.__all__) == samestep.__all__
    assert set(FUNCTIONS) | set(CLASSES) | {"__version__"} == set(samestep.__all__)
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
