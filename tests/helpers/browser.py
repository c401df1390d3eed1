"""A page in headless Chromium, by the DevTools protocol over a pipe: what it asks for, says, shows and answers."""

from __future__ import annotations

import base64
import fcntl
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--remote-debugging-pipe",
]  # fmt: skip
PATIENCE = 60.0  # seconds, for each answer


class Page:
    """One page of a new Chromium with an empty profile, which ends with it."""

    def __init__(self, path: Path, profile: Path, width: int, height: int = 900) -> None:
        self.requests: list[str] = []  # addresses asked for, but those of data within the page
        self.complaints: list[str] = []  # whatever went to the console, and exceptions
        self._loaded = False
        self._numbers = itertools.count(1)
        self._left = b""
        self._start(profile)
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self._call(f"{domain}.enable")
            self.resize(width, height)
            self._call("Page.navigate", url=path.as_uri())
            while not self._loaded:
                self._receive()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def resize(self, width: int, height: int = 900) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def value_of(self, expression: str) -> Any:
        """Evaluate JavaScript, and return what it gives as JSON has it."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, element: str, share: float = 0.5) -> None:
        """Press and release the mouse on an element (a JavaScript expression), at a share of its width."""
        left, top, width, height = self.value_of(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center', behavior: 'instant'}}); "
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, x=left + share * width,
                y=top + height / 2,
            )  # fmt: skip

    def picture(self, element: str = "document.documentElement") -> np.ndarray:
        """Return what is shown of an element, RGB [H, W, 3] of uint8."""
        x, y, width, height = self.value_of(
            f"(() => {{ const b = ({element}).getBoundingClientRect(); "
            "return [b.left + scrollX, b.top + scrollY, b.width, b.height]; })()"
        )
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        png = base64.b64decode(self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])
        with Image.open(io.BytesIO(png)) as image:
            return np.asarray(image.convert("RGB"))

    # --- the pipe: JSON, each ended by a zero byte ---

    def _start(self, profile: Path) -> None:
        assert CHROMIUM is not None
        for_browser, self._to = os.pipe()
        self._from, of_browser = os.pipe()
        # Beyond 3 and 4, where Chromium wants them.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (for_browser, of_browser)]
        script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
        command = ["bash", "-c", script, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        silent = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=high, stdin=silent, stdout=silent, stderr=silent)
        for end in (for_browser, of_browser, *high):
            os.close(end)
        self._session: str | None = None

    def _end(self) -> None:
        os.close(self._to)  # at which it ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._left:
            ready = select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]
            got = os.read(self._from, 2**20) if ready else b""
            if not got:
                raise TimeoutError("Chromium: expected an answer, got " + ("its end" if ready else "none in a minute"))
            self._left += got
        text, _, self._left = self._left.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent" and not about["request"]["url"].startswith("data:"):
            self.requests.append(about["request"]["url"])
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(about))
        elif event == "Page.loadEventFired":
            self._loaded = True
