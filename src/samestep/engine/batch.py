"""The effective batch: this rank's micro-batches, and what the batch holds over all ranks."""

from collections.abc import Iterable, Mapping

from samestep.engine.checks import check_micro_batches, no_micro_batch_error
from samestep.engine.collectives import gather_results
from samestep.engine.counts import CountParts, add_counts, count_parts, input_tokens
from samestep.engine.parallel import Idle
from samestep.engine.terms import Counter, Counts, MicroBatch


def count_batch(
    micro_batches: Iterable[MicroBatch], counters: Mapping[str, Counter] | None
) -> tuple[list[MicroBatch], Counts, int, int]:
    """This rank's micro-batches, and what the effective batch holds over all ranks.

    Args:
        micro_batches: As for `step`.
        counters: As for `step`.

    Returns:
        The micro-batches of this rank; the counts, the number of input tokens and the number of
        micro-batches over all ranks.

    Raises:
        StepError: As for `samestep.engine.counts.count_parts`.
        ConfigError: ``micro_batches`` is no iterable of micro-batches.
        DataError: No rank has a micro-batch.
    """
    local: list[MicroBatch] = []

    def count_local() -> tuple[CountParts, int, int]:
        local.extend(check_micro_batches(micro_batches))
        counted = [item for item in local if not isinstance(item, Idle)]
        return count_parts(counted, counters), sum(map(input_tokens, counted)), len(counted)

    counts, tokens, num_micro_batches = zip(*gather_results(count_local), strict=True)
    if sum(num_micro_batches) == 0:
        raise no_micro_batch_error(micro_batches)
    return local, add_counts(counts), sum(tokens), sum(num_micro_batches)


def has_no_targets(counts: Counts) -> bool:
    """Whether the batch was counted and holds nothing to learn from."""
    return bool(counts) and not any(counts.values())
