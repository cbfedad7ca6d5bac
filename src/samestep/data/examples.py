"""Examples: token ids and which of them are targets, stored flat."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from samestep.data.rows import RowTally
from samestep.engine.targets import IGNORE
from samestep.errors import DataError
from samestep.utils.files import sync

_FORMAT = "samestep examples 1"
_TYPES = {
    "ids": torch.int32,
    "is_target": torch.bool,
    "offsets": torch.int64,
    "weights": torch.float64,
    "rows": torch.int64,
}


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sequence.

    Attributes:
        input_ids: Token ids [length], int64.
        labels: [length], int64: the token itself where it is a target, else ``IGNORE``. Not
            shifted: the loss shifts.
        weight: The weight of the example in the loss.
        row: The row of the source that it is from, from 0.
        token_weights: How much each token counts as a target [length], float32; None: 1.
    """

    input_ids: Tensor
    labels: Tensor
    weight: float = 1.0
    row: int = 0
    token_weights: Tensor | None = None

    @classmethod
    def without_targets(cls, input_ids: Tensor, *, weight: float, row: int) -> "Example":
        """A sequence of which no next token is learned.

        Args:
            input_ids: Token ids [length], int64.
            weight: The weight of the example in the loss.
            row: The row of the source that it is from, from 0.

        Returns:
            The example.
        """
        return cls(input_ids, torch.full_like(input_ids, IGNORE), weight, row)


class Examples(Sequence[Example]):
    """A sequence of examples in flat tensors (5 bytes a token).

    Attributes:
        ids: Token ids of all examples [tokens], int32.
        is_target: Whether the token is a target [tokens], bool.
        offsets: Where each example starts, and the end [examples + 1], int64.
        weights: [examples], float64.
        rows: [examples], int64.
        token_weights: [tokens], float32; None: all are 1.
        dropped: How many rows of the source are missing, by reason, and which.
        cut: The rows that max_length cut; None: it is not known.
    """

    def __init__(
        self,
        ids: Tensor,
        is_target: Tensor,
        *,
        offsets: Tensor,
        weights: Tensor,
        rows: Tensor,
        dropped: Mapping[str, int],
        token_weights: Tensor | None = None,
        cut: RowTally | None = None,
    ) -> None:
        self.ids = ids
        self.is_target = is_target
        self.offsets = offsets
        self.weights = weights
        self.rows = rows
        self.token_weights = token_weights
        self.dropped = RowTally(dropped)
        self.cut = cut

    @classmethod
    def from_examples(
        cls,
        examples: Iterable[Example],
        dropped: Mapping[str, int] | None = None,
        *,
        cut: RowTally | None = None,
    ) -> "Examples":
        """Store examples flat.

        Args:
            examples: Any number; read once.
            dropped: Rows that are missing, by reason; read after the last example.
            cut: Rows that max_length cut; None: it is not known.

        Returns:
            The examples, in order.

        Raises:
            DataError: A label is neither ``IGNORE`` nor the token at its own position.
        """
        ids: list[Tensor] = []
        is_target: list[Tensor] = []
        weights: list[float] = []
        rows: list[int] = []
        token_weights: list[Tensor | None] = []
        for example in examples:
            target = example.labels != IGNORE
            if not torch.equal(example.labels[target], example.input_ids[target]):
                raise DataError(
                    f"row {example.row}: labels must be the tokens themselves, not shifted, or "
                    f"{IGNORE}"
                )
            ids.append(example.input_ids.to(torch.int32))
            is_target.append(target)
            weights.append(example.weight)
            rows.append(example.row)
            token_weights.append(example.token_weights)
        offsets = torch.zeros(len(ids) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor([len(tokens) for tokens in ids], dtype=torch.int64).cumsum(0)
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *ids]),
            torch.cat([torch.empty(0, dtype=torch.bool), *is_target]),
            offsets=offsets,
            weights=torch.tensor(weights, dtype=torch.float64),
            rows=torch.tensor(rows, dtype=torch.int64),
            dropped=dropped or {},
            token_weights=_flat_weights(token_weights, ids),
            cut=cut,
        )

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        tokens = slice(int(self.offsets[at]), int(self.offsets[at + 1]))
        input_ids = self.ids[tokens].long()
        return Example(
            input_ids=input_ids,
            labels=input_ids.where(self.is_target[tokens], IGNORE),
            weight=float(self.weights[at]),
            row=int(self.rows[at]),
            token_weights=None if self.token_weights is None else self.token_weights[tokens],
        )

    @cached_property
    def lengths(self) -> list[int]:
        """The length of each example, in tokens."""
        lengths: list[int] = self.offsets.diff().tolist()
        return lengths

    @cached_property
    def targets(self) -> list[int]:
        """The number of targets of each example after the shift: at positions 1 and later."""
        starts = self.offsets[:-1][self.offsets.diff() > 0]
        shifted = self.is_target.clone()
        shifted[starts] = False
        before = torch.zeros(len(shifted) + 1, dtype=torch.int64)
        before[1:] = shifted.cumsum(0)
        targets: list[int] = before[self.offsets].diff().tolist()
        return targets

    def highest_id(self) -> int:
        """The highest token id of all; -1 without tokens."""
        return int(self.ids.max()) if len(self.ids) else -1

    def fingerprint(self) -> str:
        """SHA-256 of the examples (not of ``dropped``), hexadecimal."""
        digest = hashlib.sha256(_FORMAT.encode())
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {len(tensor)} ".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file completely, or not at all.

        Args:
            path: The file; its folder must exist.

        Raises:
            OSError: It cannot be written; what was there is intact.
        """
        aside = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        metadata = {
            "format": _FORMAT,
            "dropped": json.dumps(self.dropped),
            "fingerprint": self.fingerprint(),
        }
        if self.cut is not None:
            metadata["rows"] = json.dumps({"dropped": self.dropped.rows, "cut": self.cut.rows})
        try:
            save_file(self._tensors(), aside, metadata=metadata)
            sync(aside)
            aside.replace(path)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"{path}: cannot be written ({error})") from error
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            Equal examples, with what was dropped.

        Raises:
            DataError: The file is missing, damaged or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        types = {name: tensor.dtype for name, tensor in tensors.items()}
        wanted = _TYPES | ({"token_weights": torch.float32} if "token_weights" in types else {})
        if metadata.get("format") != _FORMAT or types != wanted:
            raise DataError(f"{path}: not a file of examples ({_FORMAT})")
        ids, is_target = tensors.pop("ids"), tensors.pop("is_target")
        named = json.loads(metadata.get("rows", "{}"))
        dropped = RowTally(json.loads(metadata["dropped"]), named.get("dropped"))
        cut = None
        if "cut" in named:
            cut = RowTally({reason: len(at) for reason, at in named["cut"].items()}, named["cut"])
        examples = cls(ids, is_target, dropped=dropped, cut=cut, **tensors)
        if examples.fingerprint() != metadata["fingerprint"]:
            raise DataError(f"{path}: damaged, the content does not match its checksum")
        return examples

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "ids": self.ids,
            "is_target": self.is_target,
            "offsets": self.offsets,
            "weights": self.weights,
            "rows": self.rows,
        }
        if self.token_weights is not None:
            tensors["token_weights"] = self.token_weights
        return tensors


def _flat_weights(weights: Sequence[Tensor | None], ids: Sequence[Tensor]) -> Tensor | None:
    if all(weight is None for weight in weights):
        return None
    return torch.cat(
        [
            torch.ones(len(tokens)) if weight is None else weight.float()
            for weight, tokens in zip(weights, ids, strict=True)
        ]
    )
