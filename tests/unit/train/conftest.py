"""The small model that trainers are tested on."""

from pathlib import Path
from typing import Any

import pytest
from small_model import write_small


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint, written once a session; read only."""
    return write_small(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def model(folder: Path) -> Any:
    """It, loaded for one test."""
    from mmroute.backbones.load import load

    return load(folder, dtype="float32")
