"""nginx as the system has it, for a while, with its files in a folder of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["binary", "running", "settled"]

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def binary() -> str | None:
    """Path of nginx, which is often not on a user's PATH; None where it is not installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def settled(text: str, folder: Path) -> str:
    """A configuration that writes nowhere but in `folder`, and is run by whoever starts it."""
    user = "user root;" if os.geteuid() == 0 else ""  # root's workers would be `nobody`, who may not enter the folder
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in _TEMPORARY)
    own = f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
    return own + text.replace("daemon off;", "").replace("http {", f"http {{\n  access_log off; {paths}")


@contextlib.contextmanager
def running(text: str, port: int) -> Iterator[None]:
    """nginx under a configuration that listens on this port of 127.0.0.1.

    Raises:
        RuntimeError: it is not installed, or did not start.
    """
    program = binary()
    if program is None:
        raise RuntimeError("no nginx here; apt-get install nginx-light")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "nginx.conf"
        file.write_text(settled(text, folder))
        process = subprocess.Popen([program, "-p", name, "-c", str(file)], stderr=subprocess.DEVNULL)
        try:
            _wait(process, port, folder / "error.log")
            yield
        finally:
            process.terminate()
            process.wait(10)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"nginx did not start: {log.read_text() if log.exists() else 'it said nothing'}")
