"""A Hub in a folder."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from mmroute import repository

__all__ = ["Hub"]


class Hub:
    """What `HfApi` and `snapshot_download` do, in a folder; only what is allowed is fetched."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root, self.files, self.calls = root, files, []

    def api(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", commit_message))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"hub:{repo_id}"

    def snapshot(self, repo_id, allow_patterns):
        assert allow_patterns == self.files
        if not (self.root / repo_id).is_dir():
            raise OfflineModeIsEnabled("offline\nand more")
        return str(self.root / repo_id)

    @classmethod
    def instead(cls, monkeypatch: pytest.MonkeyPatch, root: Path, files: list[str]) -> "Hub":
        """Stands where the Hub stood, for this test."""
        made = cls(root, files)
        monkeypatch.setattr(repository, "HfApi", made.api)
        monkeypatch.setattr(repository, "snapshot_download", made.snapshot)
        return made
