"""A headless Chromium driven over its debugging pipe: standard library alone, no port, no driver to install.

with Browser() as browser:
    page = browser.open(path)
    page.key("ArrowRight")
    assert page.value("document.title") == "..."
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["NAMES", "Browser", "Page", "executable"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60
"""Seconds without a word after which a browser counts as stuck."""
CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13, " ": 32}


def executable() -> str | None:
    """Path of a Chromium, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One process with a profile of its own, ended with the block."""

    def __enter__(self) -> "Browser":
        program = executable()
        assert program is not None, "look for a browser with executable() first"
        self.profile = tempfile.TemporaryDirectory()
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def wire() -> None:  # the pipe is descriptors 3 and 4 of the browser
            high = [os.dup2(fd, 100 + i) for i, fd in enumerate((to_browser, from_browser))]
            for fd, target in zip(high, (3, 4), strict=True):
                os.dup2(fd, target)

        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile.name}",
        ]
        self.process = subprocess.Popen(
            [program, *options, "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self.events = itertools.count(1), b"", []
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.call("Browser.close")
        finally:
            self.process.wait(timeout=30)
            os.close(self._in)
            os.close(self._out)
            self.profile.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer; events that come meanwhile are collected."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], PATIENCE)[0]:
                raise TimeoutError(f"the browser has said nothing for {PATIENCE} seconds")
            chunk = os.read(self._in, 1 << 16)
            if not chunk:
                raise RuntimeError("the browser ended")
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def wait(self, method: str) -> None:
        """Until an event of this name has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def open(self, path: Path, fragment: str = "", size: tuple[int, int] = (1280, 1000), dark: bool = False) -> "Page":
        """A tab that shows a local file."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network"):
            page.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        width, height = size
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        page.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.wait("Page.loadEventFired")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression; a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']}")
        return got["result"].get("value")

    def text(self, name: str) -> str:
        """What the element of this id says."""
        return self.value(f"document.getElementById({json.dumps(name)}).textContent")

    def key(self, name: str) -> None:
        """A key pressed and let go, where the focus is."""
        code = CODES.get(name, ord(name.upper()[0]))
        # A button is pressed by the character that Enter types, not by the key.
        text = "\r" if name == "Enter" else name if len(name) == 1 else ""
        typed = {"text": text} if text else {}
        both = {"key": name, "code": name if len(name) > 1 else f"Key{name.upper()}", "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **both, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **both)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, the page itself left out."""
        asked = [e["params"]["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [address for address in asked[1:] if not address.startswith("data:")]

    @property
    def faults(self) -> list[str]:
        """Exceptions and console errors since then."""
        thrown = [e["params"]["exceptionDetails"]["text"] for e in self._events("Runtime.exceptionThrown")]
        said = [e["params"] for e in self._events("Runtime.consoleAPICalled")]
        return thrown + [str(s["args"]) for s in said if s["type"] == "error"]

    def _events(self, method: str) -> list[dict[str, Any]]:
        return [e for e in self.browser.events if e.get("method") == method and e.get("sessionId") == self.session]
