"""Uploading a model folder to the Hub: asked first whether it can be, and nothing lost if not."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from samestep.errors import ConfigError, SamestepError
from samestep.utils.hub import is_offline

_STALE = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
"""Files of a model that was there before, which would be loaded beside or instead of the new."""

_LOGIN = "log in by `hf auth login`, or set HF_TOKEN, with a token that may write"


def check_push(name: str) -> None:
    """Refuse, before any work, what the Hub would not take.

    Args:
        name: Of the model on the Hub.

    Raises:
        ConfigError: It is no such name, the Hub cannot be asked, or there is no token that it
            takes.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push: {name!r} is no name of a model on the Hub: {error}") from None
    if name.count("/") > 1:
        raise ConfigError(f"push: {name!r} is no name of a model on the Hub: owner/name")
    if is_offline():
        raise ConfigError("push: offline mode is on (HF_HUB_OFFLINE): unset it, or leave push out")
    api: Any = HfApi()
    try:
        who = api.whoami()
    except LocalTokenNotFoundError:
        raise ConfigError(f"push: there is no token of the Hub: {_LOGIN}") from None
    except Exception as error:  # each client of HTTP has its own
        raise ConfigError(f"push: {_reason(error)}") from None
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"push: the token of {who.get('name', '?')} may read alone: {_LOGIN}")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as a model of the Hub, which is made if it is not there.

    Args:
        folder: What `samestep export` wrote.
        name: Of the model on the Hub.
        private: Of a model that is made: whether others do not see it.

    Returns:
        Its address.

    Raises:
        SamestepError: It could not be uploaded; the folder is whole.
    """
    api: Any = HfApi()
    try:
        made = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=str(folder),
            commit_message="Upload a model trained by samestep",
            delete_patterns=list(_STALE),
        )
    except Exception as error:  # each client of HTTP has its own
        again = f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))}"
        raise SamestepError(
            f"push: {_reason(error)}. The model is whole in {folder}; to go on: {again}"
        ) from error
    return str(made)


def _reason(error: Exception) -> str:
    """Why the Hub could not be asked or did not do it, in a line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the Hub does not know the token: {_LOGIN}"
    if status == 403:
        return f"the token may not write there: {_LOGIN}, or name a model of your own"
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if status is not None:
        return f"the Hub refused it ({status}): {text}"
    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):
        return f"it failed ({type(error).__name__}: {text})"  # no client of HTTP raises these
    return f"{constants.ENDPOINT} cannot be asked ({text})"
