"""A process that runs probes: names come on stdin, a line each; results go to stdout as JSON.

python -m samestep.doctor.worker
"""

import contextlib
import json
import os
import sys
import warnings


def main() -> int:
    """Run each probe that is named, until there is none.

    Returns:
        0.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    warnings.simplefilter("ignore")
    # What libraries print is not ours: keep it away from the results.
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        from samestep.doctor.probes import run_probe

        torch.set_num_threads(1)  # the models are tiny, and two of these run side by side
        for line in sys.stdin:
            print(json.dumps(run_probe(line.strip())), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
