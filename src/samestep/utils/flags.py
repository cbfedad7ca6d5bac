"""Command lines over fields: which argument is a flag, a value or a file, and help in groups."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from tyro.constructors import PrimitiveConstructorSpec

from samestep.errors import ConfigError

Arity = Literal["none", "one", "many"]
"""How many values a flag takes."""

_WIDTH = 80


@dataclass(frozen=True)
class CommandLine:
    """The arguments of a command, told apart.

    Attributes:
        file: The YAML file, wherever it stood; None without one.
        flags: Everything else, in order.
        names: The flags' fields, as "batch_size", in order, each once.
    """

    file: str | None
    flags: list[str]
    names: list[str]


def split_command_line(arguments: Iterable[str], arities: Mapping[str, Arity]) -> CommandLine:
    """Tell flags, their values and the file apart; the file may stand anywhere.

    Args:
        arguments: What follows the command.
        arities: How many values the flag of each field takes; unknown flags take one.

    Returns:
        The parts.

    Raises:
        ConfigError: There are several files.
    """
    files: list[str] = []
    flags: list[str] = []
    names: dict[str, None] = {}
    waiting: Arity = "none"
    for argument in arguments:
        if argument.startswith("--"):
            written, equals, _ = argument.partition("=")
            name = field_of(written)
            negated = name.removeprefix("no_")
            if name not in arities and arities.get(negated) == "none":
                name = negated
            names[name] = None
            waiting = "none" if equals else arities.get(name, "one")
            known = name in arities
        elif waiting == "none" or ((waiting == "many" or not known) and _is_yaml(argument)):
            if argument[:1] != "-":
                files.append(argument)
                continue
        elif waiting == "one":
            waiting = "none"
        flags.append(argument)
    if len(files) > 1:
        raise ConfigError(
            f"one file at a time: found {' and '.join(files)} (values belong behind a flag, as in "
            f"--data {files[1]})"
        )
    return CommandLine(file=files[0] if files else None, flags=flags, names=list(names))


def field_of(flag: str) -> str:
    """The field of a flag: "batch_size" for "--batch-size"."""
    return flag.removeprefix("--").replace("-", "_")


def arity_of(annotation: Any) -> Arity:
    """How many values a field of a type takes on a command line."""
    if annotation is bool:
        return "none"
    kinds = {get_origin(member) or member for member in (annotation, *get_args(annotation))}
    return "many" if kinds & {tuple, list, dict} else "one"


def leaf(metavar: str, *, many: bool = False) -> PrimitiveConstructorSpec[Any]:
    """How a flag takes a field that holds more in a file than a flag can say.

    Args:
        metavar: How help shows its values.
        many: One value is a tuple, too.

    Returns:
        What to annotate the field with: a flag gives its texts, one as itself; the field's own
        validators make of them what it holds.
    """
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda texts: texts[0] if len(texts) == 1 and not many else tuple(texts),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _is_yaml(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml")


def describe_fields(
    fields: Mapping[str, FieldInfo], groups: Mapping[str, Sequence[str]], *, rest: str
) -> str:
    """The fields as help text of 80 columns, in groups.

    Args:
        fields: Of pydantic settings, with descriptions.
        groups: Names of fields by the title of their group; those that there are not are left out.
        rest: The title, ahead of the others, of those that no group names.

    Returns:
        Lines, each group after an empty one.
    """
    named = {name for names in groups.values() for name in names}
    all_groups = {rest: [name for name in fields if name not in named], **groups}
    lines: list[str] = []
    for title, names in all_groups.items():
        present = [name for name in names if name in fields]
        if present:
            lines += ["", f"{title}:"]
        for name in present:
            lines += _describe_field(name, fields[name])
    return "\n".join(lines)


def _describe_field(name: str, field: FieldInfo) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if field.default is True:
        flag += f", --no-{name.replace('_', '-')}"
    text = " ".join((field.description or "").split())
    default = _default(field)
    if default and f"({default}" not in text:
        text = f"{text} (default: {default})"
    head = f"  {flag} {_values(field)}".rstrip()
    body = textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    wrapped = textwrap.wrap(head.replace(",", ",\0"), _WIDTH + 8, subsequent_indent=" " * 6)
    return [*(line.replace("\0", "") for line in wrapped), *body]


def _values(field: FieldInfo) -> str:
    """The values to choose from, or what kind of value it is; nothing for a switch."""
    metavars = [item.metavar for item in field.metadata if getattr(item, "metavar", None)]
    if metavars:
        return str(metavars[0])
    if field.annotation is bool:
        return ""
    choices, kinds = _choices(field.annotation)
    shown = ["{" + ",".join(choices) + "}"] if choices else []
    text = "|".join(shown + kinds)
    return f"{text} ..." if arity_of(field.annotation) == "many" else text


def _choices(annotation: Any) -> tuple[list[str], list[str]]:
    """What a type's literals are, and the names of its other kinds of values."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)], []
    members = get_args(annotation)
    if not members:
        names = {int: "INT", float: "NUMBER", str: "TEXT"}
        return [], [names[annotation]] if annotation in names else []
    choices: list[str] = []
    kinds: list[str] = []
    for found, named in map(_choices, members):
        choices += [choice for choice in found if choice not in choices]
        kinds += [kind for kind in named if kind not in kinds]
    return choices, kinds


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else ""
    values = field.default if isinstance(field.default, tuple) else [field.default]
    return " ".join(map(str, values))
