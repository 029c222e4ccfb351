"""A headless Chromium, driven through its debugging protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import websocket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. `requests` and `complaints` (console errors, exceptions, failed loads) are those since the
    last `open`."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--use-gl=angle",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-quic",
                "--remote-allow-origins=*",
                "--remote-debugging-port=0",
                f"--user-data-dir={self.folder.name}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = Path(self.folder.name) / "DevToolsActivePort"
        wait(lambda: port_file.is_file() and port_file.read_text().strip(), "Chromium did not start", 60)
        port = port_file.read_text().split()[0]
        page = next(
            target for target in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if target["type"] == "page"
        )
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=120)
        self.number, self.requests, self.complaints, self.loaded = 0, [], [], False
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.folder.cleanup()

    def call(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message.get("method"), message.get("params"))

    def _note(self, event, about):
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Network.loadingFailed" and not about.get("canceled"):
            self.complaints.append(f"not loaded: {about['errorText']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(
                about["exceptionDetails"].get("exception", about["exceptionDetails"]).get("description", "exception")
            )
        elif event == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.complaints.append(str([a.get("value", a.get("description")) for a in about["args"]]))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.complaints.append(about["entry"]["text"])

    def open(self, url, width=1280, height=900):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.requests, self.complaints, self.loaded = [], [], False
        self.call("Page.navigate", url=url)
        wait(lambda: self.run("1") and self.loaded, f"{url} did not load", 60)

    def run(self, script):
        """Value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def move(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def wait(condition, message, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, message
        time.sleep(0.1)
    return value
