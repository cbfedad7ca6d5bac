"""`samestep study`: batch configurations side by side, measured by the same metrics."""

from samestep.utils.extras import require_installed

require_installed("train", what="samestep.study")
