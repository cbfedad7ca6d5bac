"""What was read, said before the first step: columns, rows, roles, and one row with its targets."""

import textwrap
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from samestep.data.message_forms import LEARNED_ROLE, ROLES

_WIDTH = 80
OPEN, CLOSE = "⟦", "⟧"
"""What stands around targets."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was read of a source.

    Attributes:
        format: What the rows are, in words.
        rows: How many the source has.
        kept: How many of them are learned from.
        used: The columns that were read.
        ignored: Those that were not.
        notes: What happened to rows ("dropped, no target", "cut at 256 tokens"), with their number
            and the first of them by name.
        roles: How many turns of each role.
        tokens: Tokens in all.
        targets: How many of them are targets.
        remarks: What else should be known, a sentence each.
        shown: The name of the row that is shown.
        example: That row, a text for each of its sequences, targets marked.
        by_source: How many records each of several sources gave, one source after another; None:
            it is not known.
    """

    format: str
    rows: int
    kept: int
    used: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[tuple[str, int, tuple[str, ...]], ...]
    roles: Mapping[str, int]
    tokens: int
    targets: int
    remarks: tuple[str, ...]
    shown: str
    example: tuple[str, ...]
    by_source: tuple[int, ...] | None = None

    def render(self, source: str) -> str:
        """The report as lines of at most 80 columns.

        Args:
            source: What was read, as the settings name it.

        Returns:
            Some lines.
        """
        ignored = f"; ignored: {', '.join(self.ignored)}" if self.ignored else ""
        lines = [
            *_wrapped(f"{source}: {self.rows:,} rows of {self.format}", indent=0),
            *_wrapped(f"columns: {', '.join(self.used) or 'none'}{ignored}"),
            *_wrapped(self._counts()),
        ]
        for what, number, named in self.notes:
            more = ", ..." if number > len(named) and named else ""
            names = f" ({', '.join(named)}{more})" if named else ""
            lines += _wrapped(f"{number:,} {'row' if number == 1 else 'rows'} {what}{names}")
        if self.roles:
            lines += _wrapped(f"turns: {', '.join(map(_role, self.roles.items()))}")
        for remark in self.remarks:
            lines += _wrapped(remark)
        if self.example:
            marks = f", targets between {OPEN} {CLOSE}" if OPEN in "".join(self.example) else ""
            lines += _wrapped(f"{self.shown}{marks}:")
            for text in self.example:
                lines += _cut_into_lines(text)
        return "\n".join(lines)

    def _counts(self) -> str:
        targets = f", {self.targets:,} of them targets" if self.targets else ""
        tokens = f": {self.tokens:,} tokens{targets}" if self.tokens else ""
        nothing = "" if self.notes else "; none dropped, cut or empty"
        return f"{self.kept:,} rows to learn from{tokens}{nothing}"


def _role(role: tuple[str, int]) -> str:
    name, number = role
    unknown = "" if name in ROLES else " (not learned: no role that is known here)"
    return f"{name} {number:,}{' (learned)' if name == LEARNED_ROLE else unknown}"


def escaped(text: str) -> str:
    r"""The text on one line: new lines as \n, and nothing that steers a terminal.

    Args:
        text: Anything.

    Returns:
        Printable letters.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _wrapped(text: str, *, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        escaped(text),
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_on_hyphens=False,
    )


def _cut_into_lines(text: str) -> list[str]:
    """The text in lines of at most 80 columns, cut anywhere: no space of a row is lost."""
    lines, width = [""], 0
    for letter in text:
        columns = 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if width + columns > _WIDTH - 4:
            lines.append("")
            width = 0
        lines[-1] += letter
        width += columns
    return [f"    {line}" for line in lines]
