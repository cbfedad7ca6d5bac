"""The Hub asked once, and shortly, whether it has what a name says: no minutes of retries."""

from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

_SECONDS = 5.0
"""What the Hub's answer may take."""


def is_offline() -> bool:
    """Whether the Hub must not be asked, by HF_HUB_OFFLINE."""
    return bool(constants.HF_HUB_OFFLINE)


def find_on_hub(name: str, *, kind: Literal["model", "dataset"]) -> str:
    """What to load a name of the Hub by: the name, or its folder in the Hub's cache.

    Args:
        name: Such as "owner/name".
        kind: Of the repository.

    Returns:
        The name; the folder in the cache, where the Hub cannot be asked and the cache has it.

    Raises:
        LookupError: It cannot be loaded; says why, and what to do, without the name.
    """
    try:
        if is_offline():
            raise OSError("offline mode is on, HF_HUB_OFFLINE")
        api: Any = HfApi()
        api.repo_info(name, repo_type=kind, timeout=_SECONDS)
    except GatedRepoError:
        raise LookupError(
            "access to it on the Hub has to be granted first: ask there, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise LookupError(
            f"the Hub has no {kind} of this name (a private one needs `hf auth login`)"
        ) from None
    except ValueError:
        raise LookupError(f"this is no name of a {kind} on the Hub") from None
    except Exception as error:  # each client of HTTP has its own
        folder = _cached_folder(name, kind=kind)
        if folder is None:
            raise LookupError(
                f"it is not in the Hub's cache, and {constants.ENDPOINT} cannot be asked "
                f"({_first_line(error)})"
            ) from None
        return folder
    return name


def _cached_folder(name: str, *, kind: Literal["model", "dataset"]) -> str | None:
    """The folder of the Hub's cache with the newest snapshot of a repository, if there is one."""
    try:
        return str(snapshot_download(name, repo_type=kind, local_files_only=True))
    except (OSError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
