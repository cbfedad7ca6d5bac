"""`samestep train` as a command: arguments in, a result line out."""

from collections.abc import Sequence

from samestep.train.arguments import read_config


def run(arguments: Sequence[str]) -> int:
    """Train as the arguments say.

    Args:
        arguments: ``[run.yaml] [--flag value ...]``.

    Returns:
        Exit code 0.

    Raises:
        SamestepError: As `samestep.train.trainer.train`.
    """
    config = read_config(arguments)
    # After the arguments are known to be good: this import loads PyTorch.
    from transformers.utils import logging as transformers_logging

    from samestep.train.trainer import train

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    summary = train(config)
    print(f"{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['seconds']:.1f} s")
    if summary["evaluation_after"] is not None:
        before, after = summary["evaluation_before"], summary["evaluation_after"]
        change = "" if before is None else f"{before:.4f} -> "
        print(f"evaluation loss {change}{after:.4f}")
    print(f"model in {summary['model']}")
    return 0
