"""Look at a page in headless Chromium: screenshots at a width, what it complained about, whether it fits.

Chromium is spoken to over the pipe of its DevTools protocol, so nothing but the browser is needed. A test that uses it
asks for the browser first:

    chromium = browser.require()                      # skips, with the reason, where Chromium is not installed
    assert browser.screenshot(page, 400, tmp_path / "narrow.png") == []
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--metrics-recording-only", "--mute-audio", "--remote-debugging-pipe",
)  # fmt: skip
_HEIGHT = 900
_PATIENCE = 60  # seconds that `timeout` lets a browser live; a page takes one or two
_TALLEST = 16_000  # pixels; Chromium's limit on one side of a picture


def find() -> str | None:
    """Where Chromium lies, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def require() -> str:
    """Where Chromium lies; the test is skipped where it is not installed."""
    path = find()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (apt-get install chromium)")
    return path


class Page:
    """An open page.

    Attributes:
        complaints: errors and warnings on the console, exceptions nobody caught, and whatever was asked of a network.
    """

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back, self._number, self._session = to, back, 0, ""
        self.complaints: list[str] = []
        self._loaded = False

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url: str, width: int) -> None:
        """Load an address in a window of this width and wait until it has loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=_HEIGHT, deviceScaleFactor=1, mobile=False)
        self._loaded = False
        failed = self.send("Page.navigate", url=url).get("errorText")
        if failed:
            raise RuntimeError(f"{url}: {failed}")
        while not self._loaded:
            self._read()

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window; 0 when nothing must be scrolled sideways."""
        return int(self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def picture(self) -> bytes:
        """The whole page as PNG, from top to bottom."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], _TALLEST), "scale": 1}
        data = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        return base64.b64decode(data)

    def pdf(self) -> bytes:
        """The page as it prints on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True, **size)["data"])

    def _read(self) -> dict[str, Any]:
        buffer = bytearray()
        while byte := self._back.read(1):
            if byte == b"\0":
                message: dict[str, Any] = json.loads(buffer)
                self._note(message)
                return message
            buffer += byte
        raise RuntimeError("Chromium ended before it answered")

    def _note(self, message: dict[str, Any]) -> None:
        event, about = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            values = (str(one.get("value", one.get("description"))) for one in about["args"])
            self.complaints.append(f"console {about['type']}: {' '.join(values)}")
        elif event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.complaints.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log {about['entry']['level']}: {about['entry']['text']}")
        elif event == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"network: {about['request']['url'][:200]}")


@contextlib.contextmanager
def opened(page: Path, width: int) -> Iterator[Page]:
    """A file opened in a browser of its own, `width` pixels wide; the browser ends with the block."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol wants descriptors 3 (commands in) and 4 (answers out); the shell puts them there.
        words = ["timeout", "-k", "5", str(_PATIENCE), require(), *_FLAGS, f"--user-data-dir={profile}"]
        shell = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        with os.fdopen(to_browser[1], "wb") as to, os.fdopen(from_browser[0], "rb") as back:
            try:
                tab = Page(to, back)
                tab.open(page.resolve().as_uri(), width)
                yield tab
            finally:
                process.terminate()
                process.wait()


def screenshot(page: Path, width: int, out: Path) -> list[str]:
    """Write a picture of the whole page, `width` pixels wide, to `out`; returns what the page complained about.

    Complaints are errors and warnings of the console, exceptions, requests to a network, and a page that is wider than
    its window.
    """
    with opened(page, width) as tab:
        out.write_bytes(tab.picture())
        if tab.overflow() > 0:
            tab.complaints.append(f"the page is {tab.overflow()} px wider than its window of {width} px")
        return list(tab.complaints)
