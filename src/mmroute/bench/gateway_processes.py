"""Two scripted upstreams and a gateway in front, or several, as processes of their own on loopback."""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

__all__ = ["SETTINGS", "Processes", "free_port", "request_body", "resident_mib", "settings_of", "started"]

SETTINGS: dict[str, Any] = {
    "policy": {"name": "budget", "budget": 0.4},
    "timeouts": {"connect_s": 3, "pool_s": 5, "rating_s": 1.0, "first_byte_s": 1.5, "between_bytes_s": 5},
    "retries": {"backoff_s": 0.02, "share": 1.0},
    # Faults are drawn at random here, so a row of them says nothing about the server.
    "circuit": {"failures": 1_000_000, "window_calls": 1_000_000},
    "drain_delay_s": 0,
}


def settings_of(patience: float) -> dict[str, Any]:
    """Settings for a machine on which everything takes so many times as long."""
    return {**SETTINGS, "timeouts": {name: patience * seconds for name, seconds in SETTINGS["timeouts"].items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Processes:
    """Two upstreams and a gateway in front, each a process; `start_gateway` adds more."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in ("draft", "target", "gateway")}
        roles = {
            role: {"url": f"http://127.0.0.1:{self.ports[role]}/v1", "model": role, "served": f"the-{role}"}
            for role in ("draft", "target")
        }
        self._settings = {**SETTINGS, **roles, **settings}
        self.config = self._configure("gateway", {})
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def urls(self) -> dict[str, str]:
        return {name: self.url(name) for name in self.ports}

    def start(self) -> None:
        for role in ("draft", "target"):
            self._run(role, "mmroute.bench.upstream", "--role", role, "--port", str(self.ports[role]))
        self.start_gateway()

    def start_gateway(self, name: str = "gateway", **settings: Any) -> None:
        """Starts one; under another name a second one, before the same upstreams.

        Args:
            name: of its log and port.
            settings: what it has of its own.
        """
        config = self._configure(name, settings)
        code = "import sys; from mmroute.cli import main; sys.argv[0] = 'mmroute'; main()"
        self._spawn(name, [sys.executable, "-c", code, "serve", "--config", str(config)])
        self.wait(name, "/ready")

    def _configure(self, name: str, settings: dict[str, Any]) -> Path:
        port = self.ports.setdefault(name, free_port())
        file = self.folder / f"{name}.json"  # JSON is YAML
        file.write_text(json.dumps({**self._settings, "port": port, **settings}))
        return file

    def _run(self, name: str, module: str, *arguments: str) -> None:
        self._spawn(name, [sys.executable, "-m", module, *arguments])
        self.wait(name, "/v1/models")

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, name: str, path: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.running[name].poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url(name) + path, timeout=2, trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{name} did not start: {(self.folder / f'{name}.log').read_text()[-2000:]}")

    def stop(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def started(settings: dict[str, Any] | None = None) -> Iterator[Processes]:
    """The three processes, stopped at the end whatever happens."""
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder), settings or {})
        try:
            processes.start()
            yield processes
        finally:
            processes.stop()


def request_body(question: str, **rest: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": question}], **rest}


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process; None where /proc does not say."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
