"""KTO: completions with a thumb up or down."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from samestep.train.objectives.preference import ReferenceConfig

if TYPE_CHECKING:
    from samestep.data.collate import Padding
    from samestep.data.records import Records
    from samestep.engine.terms import Objective


class KTOConfig(ReferenceConfig):
    """KTO: learn from completions that are good or bad by themselves (arXiv:2402.01306)."""

    objective: Literal["kto"] = "kto"
    """What to optimise; `samestep train --objective NAME --help` lists what belongs to it."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the reference holds the policy."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of desirable completions."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of undesirable completions."""

    def read(self, source: str, tokenizer: Any, like: "Records | None" = None) -> "Records":
        """Rows of prompt, completion and label."""
        from samestep.data.load import load_rows
        from samestep.data.readers.preference import unpaired_records
        from samestep.utils.files import cache_folder

        return unpaired_records(
            load_rows(source),
            tokenizer,
            max_length=self.max_length,
            append_eos=self.append_eos,
            cache=cache_folder() / "tokens",
        )

    def collate(
        self,
        data: "Records",
        indices: Sequence[int],
        *,
        padding: "Padding",
        pad_id: int,
        key: tuple[int, int],
    ) -> dict[str, Any]:
        """The examples themselves, and a second micro-batch of their mismatched completions."""
        from samestep.data.readers.preference import collate_unpaired

        return collate_unpaired([data[at] for at in indices], padding=padding, pad_id=pad_id)

    def build(self, model: Any, data: Sequence["Records"]) -> "Objective":
        """The coupled loss, with a reference that is live or run once."""
        from dataclasses import replace

        from samestep.engine.terms import Objective
        from samestep.engine.two_pass import TwoPass
        from samestep.objectives.kto import KTO, KTO_COUNTERS

        kto = KTO(
            self.reference(model),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        if not self.precompute_reference:
            return Objective(TwoPass(kto), KTO_COUNTERS)
        loss = TwoPass(replace(kto, reference=None))
        return Objective(loss, KTO_COUNTERS, annotate=kto.reference_log_p)
