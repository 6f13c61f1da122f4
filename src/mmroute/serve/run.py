"""The process around the application: uvicorn, signals, drain, reload.

SIGTERM and SIGINT drain (a second one ends at once), SIGHUP reloads.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from mmroute.serve.gateway import Gateway, build_app
from mmroute.serve.settings import Settings

__all__ = ["serve"]

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Drains before it stops accepting: uvicorn alone would close the port at once, under the balancer's feet."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, watched: list[Path]) -> None:
        super().__init__(config)
        self.gateway, self._watched = gateway, watched
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reloading: asyncio.Task[bool] | None = None
        self._poll: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        if self.gateway.settings.reload == "poll":
            self._poll = asyncio.create_task(self.gateway.watch_files(self._watched))
        url = f"http://{self.config.host}:{self.servers[0].sockets[0].getsockname()[1]}"
        log.info("serving on %s (page at /, OpenAI clients at /v1)", url)
        await super().main_loop()
        if self._poll is not None:
            self._poll.cancel()

    def _reload(self) -> None:
        assert self._loop is not None
        self._reloading = self._loop.create_task(self.gateway.reload())  # a task nobody holds may be collected

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not remembered as uvicorn does, which raises it again at the end: a drained process exits with 0.
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
        else:
            self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d requests run", len(self.gateway.tasks))
        await self.gateway.drain()
        self.should_exit = True


def serve(settings: Settings, reread: Callable[[], Settings], watched: list[Path]) -> None:
    """Runs until a signal ends it.

    Args:
        reread: the settings as they are now, for reloads.
        watched: files that `reload: poll` looks at.
    """
    gateway = Gateway(settings, reread=reread)
    config = uvicorn.Config(
        build_app(settings, gateway),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=1,  # what runs has been waited for by then
        timeout_keep_alive=65,  # longer than balancers keep theirs, or they meet a closed one
    )
    _Server(config, gateway, watched).run()
