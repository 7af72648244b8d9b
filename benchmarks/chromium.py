"""Headless Chromium, driven by the DevTools protocol over a pair of pipes: no port is opened, no package needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Nothing that asks other machines.
_QUIET = """--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync --disable-default-apps --disable-extensions --window-size=1100,720 --autoplay-policy=no-user-gesture-required"""
# Chromium reads commands from descriptor 3 and writes to 4.
_START = 'exec "$@" --remote-debugging-pipe 3<&"$READ" 4>&"$WRITE"'


class Page:
    """A page of a Chromium of its own."""

    def __init__(self, url: str, profile: Path, *options: str) -> None:
        assert CHROMIUM is not None
        # Chromium's sandbox refuses root.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [CHROMIUM, *_QUIET.split(), *sandbox, *options, f"--user-data-dir={profile}", "about:blank"]
        self._closing = ExitStack()
        self._process, self._commands, self._replies = _start(command)
        self._closing.callback(self._end)
        self._number, self._unread = 0, bytearray()
        self._session: str | None = None
        self.log: list[str] = []
        """Uncaught exceptions and console output."""
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._number, "method": method, "params": parameters, **session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply["error"])
                return dict(reply["result"])
            if reply.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.log.append(json.dumps(reply["params"])[:2000])

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; waits for a promise."""
        reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_for(self, expression: str, fits: Callable[[Any], bool] = bool, limit_s: float = 120.0) -> Any:
        """Evaluate until the value fits, and return it."""
        deadline_s = time.monotonic() + limit_s
        while not fits(value := self.evaluate(expression)):
            assert time.monotonic() < deadline_s, (expression, value, self.log)
            time.sleep(0.05)
        return value

    def choose_files(self, selector: str, files: Sequence[Path]) -> None:
        """Choose files in a file input, as a user does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.absolute()) for file in files])

    def screenshot(self, path: Path) -> None:
        """Write a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _read(self) -> dict[str, Any]:
        while (end := self._unread.find(b"\0")) < 0:
            received = os.read(self._replies, 1 << 20)
            assert received, f"Chromium ended with exit code {self._process.wait(10)}"
            self._unread += received
        message = json.loads(self._unread[:end])
        del self._unread[: end + 1]
        return dict(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.close()

    def _end(self) -> None:
        # Chromium ends when its pipe does.
        self._commands.close()
        os.close(self._replies)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def fake_camera(video: Path) -> list[str]:
    """Return Chromium's options for a camera that shows an uncompressed file, which pages may use without asking."""
    return [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={video}",
    ]


def write_y4m(path: Path, luma_THW: NDArray[np.uint8], fps: int = 30) -> Path:
    """Write the uncompressed file that the fake camera shows: levels of luma; colours are grey."""
    frames, height, width = luma_THW.shape
    grey = bytes([128]) * (height * width // 2)
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C420jpeg\n".encode())
        for number in range(frames):
            file.write(b"FRAME\n" + luma_THW[number].tobytes() + grey)
    return path


def _start(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], IO[bytes], int]:
    """Start Chromium; return it, the file for commands, and the descriptor with the replies."""
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    # Far from 3 and 4, which the shell replaces.
    theirs = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in (their_input, their_output)]
    process = subprocess.Popen(
        ["bash", "-c", _START, "chromium", *command],
        env={**os.environ, "READ": str(theirs[0]), "WRITE": str(theirs[1])},
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for each in (their_input, their_output, *theirs):
        os.close(each)
    return process, os.fdopen(our_output, "wb"), our_input
