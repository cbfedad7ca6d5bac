"""Which module may import which, and how long a file may be, read from the source."""

import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import samestep
from source_graph import circles, import_graph, imports, modules

SOURCE = Path(__file__).parent.parent / "src"
PROJECT = SOURCE.parent / "pyproject.toml"
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "utils": {"errors"},
    "kernels": {"errors", "utils"},
    "engine": {"errors", "utils"},
    "loops": {"engine", "errors", "utils"},
    "losses": {"engine", "errors", "kernels", "utils"},
    "data": {"engine", "errors", "utils"},
    "models": {"data", "engine", "errors", "kernels", "losses", "utils"},
    "hf": {"engine", "errors", "losses", "models", "utils"},
    "objectives": {"data", "engine", "errors", "losses", "models", "utils"},
    "audit": {"engine", "errors", "utils"},
    "doctor": {"audit", "errors", "hf", "loops", "utils"},
    "train": {
        *("data", "engine", "errors", "kernels", "losses", "models", "objectives", "utils"),
    },
    "study": {"data", "engine", "errors", "models", "train", "utils"},
    "cli": {"audit", "doctor", "errors", "study", "train", "utils"},
    "__main__": {"cli"},
}
"""What each package, or module at the root, may import of samestep beside itself, lowest first."""

SETTINGS = "samestep.train.settings"
"""The settings of a run: a module, or a package, or several modules of that beginning."""

HEAVY = frozenset(
    {
        *("accelerate", "bitsandbytes", "datasets", "diffusers", "peft", "safetensors", "torch"),
        "transformers",
    }
)
"""Packages that are or that load PyTorch: `--help` and a wrong flag must not wait for them."""

CORE = frozenset({"torch", "numpy", "packaging", "rich", "tyro"})
"""What `pip install samestep` brings: every module may import it."""

OUTSIDE: dict[str, set[str]] = {
    "utils": {"huggingface_hub", "pydantic", "yaml"},
    "kernels": {"transformers"},
    "hf": {"transformers"},
    "data": {"PIL", "datasets", "fsspec", "pyarrow", "safetensors", "transformers"},
    "models": {"bitsandbytes", "diffusers", "peft", "safetensors", "transformers"},
    "audit": {
        *("accelerate", "altair", "datasets", "jinja2", "markupsafe", "pytest", "transformers"),
        "vl_convert",
    },
    "doctor": {"accelerate", "datasets", "lightning", "tokenizers", "transformers"},
    "train": {
        *("IPython", "bitsandbytes", "filelock", "huggingface_hub", "pydantic", "pydantic_core"),
        *("safetensors", "trackio", "transformers", "wandb", "yaml"),
    },
    "study": {
        *("altair", "huggingface_hub", "jinja2", "markupsafe", "pydantic", "safetensors"),
        *("transformers", "vl_convert"),
    },
}
"""What else each package may import, at any time. The other packages, such as the step and the
losses, import nothing else."""


def part(module: str) -> str:
    """The package, or the module at the root, that a module belongs to."""
    return module.split(".")[1] if "." in module else module


LIGHT = (
    "samestep.__main__",
    "samestep.audit.adapters.processes",
    "samestep.audit.check",
    "samestep.audit.command",
    "samestep.audit.worker",
    "samestep.doctor.command",
    *sorted({home for home in samestep._HOME.values() if part(home) != "train"}),
)
"""What must be importable with the core alone: `samestep check` and its process, `samestep doctor`,
and every public name but those of a run, which say what they need."""

LONGEST_FILE = 400


def forbidden(name: str, source: Path) -> list[str]:
    """The imports of a package, or a module at the root, that `PACKAGES` does not allow."""
    return [
        f"{module} imports {target}"
        for module, imported in import_graph(source).items()
        for target in sorted(imported)
        if part(module) == name and part(target) not in {*PACKAGES[name], name, "samestep"}
    ]


def outside(name: str, source: Path) -> dict[str, set[str]]:
    """What a package, or a module at the root, imports beside the standard library and the core."""
    known = modules(source)
    found = {
        module: {each.module.partition(".")[0] for each in imports(path, known)}
        for module, path in known.items()
        if part(module) == name
    }
    ours = {*sys.stdlib_module_names, *CORE, "samestep"}
    return {module: roots - ours for module, roots in found.items() if roots - ours}


def way_to_extra(module: str, source: Path) -> list[str]:
    """A chain of imports from a module to what the core lacks, when it is imported."""
    roots = [each for name in PACKAGES for each in outside(name, source).values()]
    return _way(module, source, set().union(*roots), late=False)


def way_to_heavy(module: str, source: Path) -> list[str]:
    """A chain of imports from a module to a heavy package; empty if there is none.

    Of the module itself imports inside functions count too; of what it imports only those that run
    when it is imported. The packages that a module lies in are imported with it.
    """
    return _way(module, source, HEAVY, late=True)


def _way(module: str, source: Path, packages: Collection[str], *, late: bool) -> list[str]:
    """The shortest chain of imports from a module to one of these packages.

    Args:
        module: Its name.
        source: The folder of the package.
        packages: What must not be reached.
        late: Whether imports inside functions of the module itself count.
    """
    known = modules(source)
    ways: dict[str, list[str]] = {module: [module]}
    waiting = [module]
    while waiting:
        name = waiting.pop(0)
        if name.partition(".")[0] in packages:
            return ways[name]
        if name not in known:
            continue
        found = imports(known[name], known)
        reached = {
            each.module
            for each in found
            if not each.for_types and ((late and name == module) or not each.in_function)
        }
        for target in sorted(reached | _with_parents(reached | {name}) & known.keys()):
            if target not in ways:
                ways[target] = [*ways[name], target]
                waiting.append(target)
    return []


def _with_parents(names: Iterable[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {".".join(each[:length]) for each in parts for length in range(1, len(each) + 1)}


def too_long(source: Path) -> list[str]:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in modules(source).values()}
    return [f"{path}: {number}" for path, number in lines.items() if number > LONGEST_FILE]


def test_there_are_no_circles() -> None:
    assert circles(import_graph(SOURCE)) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_layers(name: str) -> None:
    assert forbidden(name, SOURCE) == []


def test_nothing_imports_upward() -> None:
    below: set[str] = set()
    for name, allowed in PACKAGES.items():
        assert allowed <= below, f"{name} stands below {sorted(allowed - below)}"
        below.add(name)


def test_every_package_has_its_place() -> None:
    assert {part(module) for module in modules(SOURCE)} - {"samestep"} == set(PACKAGES)


def test_the_audit_knows_nothing_of_the_trainer() -> None:
    assert not PACKAGES["audit"] & {"train", "study", "objectives", "losses", "data", "models"}


def test_nothing_imports_the_command_line() -> None:
    users = [name for name, found in import_graph(SOURCE).items() if "samestep.cli" in found]
    assert users == ["samestep.__main__"]


def test_settings_do_not_reach_pytorch() -> None:
    settings = [name for name in modules(SOURCE) if name.startswith(SETTINGS)]
    assert settings
    ways = {name: way_to_heavy(name, SOURCE) for name in settings}
    assert not any(ways.values()), "\n".join(" -> ".join(way) for way in ways.values() if way)


def test_the_core_is_what_it_says() -> None:
    (text,) = re.findall(r"^dependencies = \[(.*?)\]", PROJECT.read_text("utf-8"), re.M | re.S)
    assert {Requirement(line).name for line in re.findall(r'"(.+?)"', text)} == CORE


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_of_others(name: str) -> None:
    allowed = OUTSIDE.get(name, set())
    wrong = {module: roots - allowed for module, roots in outside(name, SOURCE).items()}
    assert not any(wrong.values()), wrong


def test_the_core_needs_nothing_else() -> None:
    ways = {name: way_to_extra(name, SOURCE) for name in LIGHT}
    assert not any(ways.values()), "\n".join(" -> ".join(way) for way in ways.values() if way)


def test_no_file_is_too_long() -> None:
    assert too_long(SOURCE) == []


def package(folder: Path, files: dict[str, str]) -> Path:
    """A package samestep of these files in a folder."""
    for name, text in files.items():
        path = folder / "samestep" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    (folder / "samestep" / "__init__.py").touch()
    return folder


def test_the_test_sees_a_late_import(tmp_path: Path) -> None:
    late = "def late():\n    from samestep.b import b\n"
    source = package(tmp_path, {"a.py": late, "b.py": "import samestep.a\n"})
    assert import_graph(source)["samestep.a"] == {"samestep.b"}
    assert import_graph(source, at_import_only=True)["samestep.a"] == set()
    assert circles(import_graph(source)) == [["samestep.a", "samestep.b"]]


def test_the_test_sees_a_forbidden_import(tmp_path: Path) -> None:
    late = "def late():\n    from samestep.train import trainer\n"
    source = package(tmp_path, {"audit/axes/ranks.py": late, "train/trainer.py": ""})
    assert forbidden("audit", source) == [
        "samestep.audit.axes.ranks imports samestep.train.trainer"
    ]
    assert forbidden("train", source) == []


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ("import torch\n", ["torch"]),
        ("def late():\n    from torch import nn\n", ["torch"]),
        ("from samestep import model\n", ["samestep.model", "samestep.deep", "torch.nn"]),
        ("from samestep.kit.light import f\n", ["samestep.kit", "samestep.deep", "torch.nn"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n", None),
        ("import samestep.careful\n", None),
    ],
)
def test_the_test_sees_settings_that_load_pytorch(
    tmp_path: Path, settings: str, way: list[str] | None
) -> None:
    files = {
        "train/settings/base.py": settings,
        "model.py": "from samestep.deep import layer\n",
        "deep.py": "try:\n    from torch.nn import Linear\nexcept ImportError:\n    pass\n",
        "careful.py": "def late():\n    import torch\n",
        "kit/light.py": "",
    }
    source = package(tmp_path, files)
    (source / "samestep/kit/__init__.py").write_text("import samestep.deep\n", encoding="utf-8")
    name = f"{SETTINGS}.base"
    assert way_to_heavy(name, source) == ([] if way is None else [name, *way])


def test_the_test_sees_what_the_core_lacks(tmp_path: Path) -> None:
    files = {
        "engine/step.py": "import torch\nfrom samestep.losses import loss\n",
        "losses/loss.py": "import transformers.models\n",
        "losses/late.py": "def late():\n    import peft\n",
        "train/late.py": "import samestep.losses.late\n",
    }
    source = package(tmp_path, files)
    assert outside("losses", source) == {
        "samestep.losses.late": {"peft"},
        "samestep.losses.loss": {"transformers"},
    }
    name = "samestep.engine.step"
    assert way_to_extra(name, source) == [name, "samestep.losses.loss", "transformers.models"]
    assert way_to_extra("samestep.train.late", source) == []


def test_the_test_sees_a_file_that_is_too_long(tmp_path: Path) -> None:
    source = package(tmp_path, {"a.py": "\n" * LONGEST_FILE, "b.py": "\n" * (LONGEST_FILE + 1)})
    assert too_long(source) == [f"{source / 'samestep/b.py'}: 401"]
