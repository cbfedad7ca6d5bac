"""`samestep train`: from rows to a fine-tuned model."""

from samestep.utils.extras import require_installed

require_installed("train", what="samestep.train")
