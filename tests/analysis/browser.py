"""A real browser without a window, to look at pages with: Chromium, told what to do by its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PATIENCE = 90.0
"""Seconds for any one answer."""
_ABOVE_STANDARD = 10
"""File descriptors from here on are not among those that the browser gives a meaning to."""


class Page:
    """One page of a running browser.

    Args:
        out, back: file descriptors to write commands to and read answers from.

    Attributes:
        mistakes: errors of scripts, and what the page's own policy refused.
        fetched: addresses asked for, other than the page's own and ``data:``.
    """

    def __init__(self, out: int, back: int) -> None:
        self._out, self._back = out, back
        self._number, self._unread = 0, b""
        self._session: str | None = None
        self._loaded = False
        self.mistakes: list[str] = []
        self.fetched: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Gives a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            self._unread += os.read(self._back, 1 << 20)
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"), event.get("params", {}):
            case "Page.loadEventFired", _:
                self._loaded = True
            case "Runtime.exceptionThrown", about:
                self.mistakes.append(str(about["exceptionDetails"]))
            case "Log.entryAdded", {"entry": entry} if entry["level"] == "error":
                self.mistakes.append(entry["text"])
            case "Network.requestWillBeSent", {"request": {"url": url}} if not url.startswith(("data:", "file:")):
                self.fetched.append(url)

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Shows a file in a window of this size in pixels and waits until it is there."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self._loaded = False
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._note(self._receive())
        self.run("Promise.all([...document.images].map((one) => one.decode()))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it promises."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, target: Path) -> None:
        """The whole page as a png file."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        target.write_bytes(base64.b64decode(data))

    def paper(self) -> bytes:
        """The page printed on A4, as a pdf."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True, **size)["data"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page in a fresh browser; skips the test where no browser is installed.

    Args:
        profile: folder for what the browser remembers.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser to look at the page with: install one of {', '.join(NAMES)}")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def wire() -> None:
        # The browser reads commands from descriptor 3 and answers on 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, _ABOVE_STANDARD) for end in (theirs_in, theirs_out)]
        for number, end in enumerate(ends, 3):
            os.dup2(end, number)
            os.close(end)

    # In containers it runs as root, without the kernel's sandbox, and with a small /dev/shm.
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    process = subprocess.Popen(
        [program, *options, "--hide-scrollbars", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=wire,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(ours_out)
        os.close(ours_in)
