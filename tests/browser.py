"""A headless Chromium for tests of the page, driven by its DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. `errors` and `requests` are what it has met since `open`."""

    def __init__(self, profile):
        words = [
            BINARY,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1400,1000",
        ]
        words += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        # The browser reads on 3 and writes on 4, whatever the pipes' own numbers are.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]

        def take_the_pipes():
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(words, preexec_fn=take_the_pipes, pass_fds=(3, 4), **quiet)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.unread, self.number, self.session = b"", 0, None
        self.errors, self.requests, self.loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]

    def read(self) -> dict:
        """The next message; what a page does by itself is noted."""
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.back], [], [], 60)
            assert ready, "the browser has said nothing for a minute"
            some = os.read(self.back, 1 << 20)
            assert some, "the browser has ended"
            self.unread += some
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        method = message.get("method")
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.errors.append(message["params"])
        if method == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self.loaded |= method == "Page.loadEventFired"
        return message

    def open(self, url: str):
        """Goes to a page and waits until it is there."""
        for step in ("about:blank", url):  # else a page that differs by its hash is not read anew
            self.errors, self.requests, self.loaded = [], [], False
            self.call("Page.navigate", url=step)
            self.wait()

    def wait(self):
        """Until a page has been loaded since `loaded` was False."""
        while not self.loaded:
            self.read()

    def ask(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return self.ask(f"document.querySelector({selector!r}).textContent")

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view."""
        node = f"document.querySelector({selector!r})"
        self.ask(f"{node}.scrollIntoView({{block: 'center'}})")
        box = self.ask(f"(b => [b.x, b.y, b.width, b.height])({node}.getBoundingClientRect())")
        return box[0] + box[2] / 2, box[1] + box[3] / 2

    def point(self, selector: str):
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str):
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str):
        text = dict(text=name) if len(name) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self.session = None
        os.write(self.to, json.dumps(dict(id=self.number + 1, method="Browser.close")).encode() + b"\0")
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)
