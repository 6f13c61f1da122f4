"""The Hub, both ways: a folder of small files is fetched from a repository, or sent to one. Imports no torch.

Reading needs the Hub only where a name is no folder here and the files are not in the local cache.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mmroute.errors import CheckpointMismatch, ConfigError, MmrouteError

__all__ = ["check_id", "fetched", "is_hub_id", "send"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str | Path) -> bool:
    """Whether this names a repository on the Hub rather than a folder: `owner/name`.

    Example:
        >>> is_hub_id("me/router"), is_hub_id("./me/router"), is_hub_id("/me/router")
        (True, False, False)
    """
    text = str(name)
    return not isinstance(name, Path) and not text.startswith(".") and bool(_HUB_ID.fullmatch(text))


def fetched(name: str, files: Sequence[str], writer: str) -> Path:
    """The folder of a repository, from the local cache where it is there.

    Args:
        name: `owner/name`.
        files: what is read of it.
        writer: what writes such folders, for the message.

    Raises:
        CheckpointMismatch: it is not there, or cannot be fetched.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except RepositoryNotFoundError:
        raise CheckpointMismatch(
            f"{name!r} is not on the Hub, or private; check the id, or log in: hf auth login"
        ) from None
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        cause = str(error).strip().splitlines()[0]
        raise CheckpointMismatch(
            f"{name!r} is no folder, is not in the local cache and cannot be fetched from the Hub ({cause}); give a "
            f"folder that {writer} wrote, or fetch it while online: hf download {name}"
        ) from None


def check_id(repo_id: str) -> None:
    """Raises `ConfigError` for what is no name of a repository."""
    if not is_hub_id(repo_id):
        raise ConfigError(f"repo_id is owner/name, given {repo_id!r}")


def send(folder: Path, repo_id: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Uploads a folder's files; the repository is made if it is not there.

    Args:
        folder: all of it goes.
        repo_id: `owner/name`.
        private: as on the Hub; None is the owner's default.
        token: access token; None is the one of `hf auth login`.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        MmrouteError: the Hub refused.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        cause = str(error).strip().splitlines()[0]
        raise MmrouteError(f"{repo_id} could not be written ({cause}); log in with `hf auth login`") from None
