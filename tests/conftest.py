"""What every test stands on: no network, one thread, float32, and global state put back after each test."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import torch.distributed

LOOPBACK = ("127.0.0.1", "::1", "localhost", "")


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Connecting beyond this machine is a failure with the address in it, not a wait."""
    patch = pytest.MonkeyPatch()

    def guarded(connect: Callable) -> Callable:
        def check(self: socket.socket, address: object) -> object:
            if isinstance(address, tuple) and address[0] not in LOOPBACK:
                raise RuntimeError(f"a test tried to reach {address}; tests run offline")
            return connect(self, address)

        return check

    patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """Each test starts with one thread, float32 and gradients on, and leaves no process group behind."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a family's tiny checkpoint folder, by name; written once a session. Read only: copy it to alter it."""
    import folders  # transformers' model classes take seconds to import; only tests that load need them

    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else folders.write(name, folder)

    return get


@pytest.fixture(scope="session")
def loaded(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """A family's tiny model with its processor, by name; loaded once a session. Attach it, and leave it as it was."""
    import mmroute

    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = mmroute.load(tiny_folder(name))
        return models[name]

    return get
