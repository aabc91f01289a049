"""A headless Chromium that is driven through two pipes, without a driver program or a network."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """Chromium's debugging protocol: messages of JSON, each ended by a zero byte."""

    def __init__(self, to: BinaryIO, back: BinaryIO) -> None:
        self._to, self._back, self._sent = to, back, 0
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.problems: list[str] = []
        for part in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{part}.enable")
        self.tell("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    _session: str | None = None
    problems: list[str]

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, file: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a file in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.problems.clear()
        self.tell("Page.navigate", url=file.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def value(self, code: str) -> Any:
        """What a piece of JavaScript gives."""
        got = self.tell("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        """A key of the keyboard, for what has the focus."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def picture(self, file: Path, whole: bool = True) -> bytes:
        """A screenshot, of the whole page or of the window, also written to a file."""
        shot = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        content = base64.b64decode(shot["data"])
        file.write_bytes(content)
        return content

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (one := self._back.read(1)) != b"\0":
            assert one, "Chromium has ended"
            text += one
        message = json.loads(text)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"):
            self.problems.append(json.dumps(message["params"]))
        return message


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser while the block runs; skips the test where none is installed (``.ci/run`` installs one)."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    joined = " ".join(f"'{one}'" for one in command) + f" 3<&{read_commands} 4>&{write_answers}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {joined}"], pass_fds=(read_commands, write_answers), stderr=subprocess.DEVNULL
    )
    os.close(read_commands)
    os.close(write_answers)
    with os.fdopen(commands, "wb") as to, os.fdopen(answers, "rb", buffering=1 << 16) as back:
        try:
            yield Browser(to, back)
        finally:
            process.terminate()
            process.wait(20)
