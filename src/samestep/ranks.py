"""What the step knows of other ranks: so far, to refuse them."""

import torch.distributed

from samestep.errors import ConfigError


def refuse_several_ranks() -> None:
    """Refuse to run where counts would have to be added up over ranks.

    Raises:
        ConfigError: ``torch.distributed`` runs with more than one rank.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise ConfigError(
                f"{ranks} ranks: this version counts targets on one rank only, so the step would "
                "not be exact. Run one process"
            )
