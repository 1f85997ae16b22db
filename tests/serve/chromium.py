"""A page in headless Chromium, spoken to over a pipe (the DevTools protocol)."""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
SECONDS = 60


class Page:
    """One tab. Use as a context manager.

    Attributes:
        requests: the address of everything that was asked for.
        complaints: exceptions of scripts, and what the browser logged: refused styles, and so on.
    """

    def __enter__(self) -> "Page":
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise RuntimeError("these tests need Chromium: install Debian's package chromium")
        self._folder = tempfile.TemporaryDirectory(prefix="portattn-chromium-")
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()

        def at_3_and_4() -> None:
            # First out of the way, since they may be 3 and 4 themselves the other way round.
            high = os.dup(theirs), os.dup(answers)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"],
            pass_fds=(3, 4), preexec_fn=at_3_and_4, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._numbers, self._unread = itertools.count(1), b""
        self._session = ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        os.close(self._to)
        os.close(self._from)
        time.sleep(0.1)  # its children write into the folder for a moment
        self._folder._ignore_cleanup_errors = True
        self._folder.cleanup()

    def _message(self) -> dict:
        while b"\0" not in self._unread:
            chunk = os.read(self._from, 1 << 16)
            if not chunk:
                raise RuntimeError(f"Chromium ended with {self._process.wait(SECONDS)}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            entry = params["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def call(self, method: str, **params: object) -> dict:
        """A method's result."""
        number = next(self._numbers)
        message: dict = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def go(self, url: str) -> None:
        """Open an address and wait until all of it is there."""
        before = self._loaded
        self.call("Page.navigate", url=url)
        while self._loaded == before:
            self._note(self._message())

    def look(self, *, dark: bool = False, width: int = 1200, height: int = 900) -> None:
        """Set the colour scheme that is preferred, and the window's size."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def do(self, script: str) -> object:
        """The value of an expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def press(self, selector: str) -> None:
        """Click in the middle of an element with the mouse."""
        x, y = self.do(
            f"(() => {{const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def follow(self, selector: str) -> None:
        """Click on a link and wait for its page."""
        before = self._loaded
        self.press(selector)
        while self._loaded == before:
            self._note(self._message())

    def type(self, selector: str, text: str) -> None:
        """Click into a field and type."""
        self.press(selector)
        self.call("Input.insertText", text=text)
