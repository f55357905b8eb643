"""A headless Chromium, driven through chromedriver's own HTTP interface (W3C WebDriver)."""

import base64
import shutil
import subprocess
import time
from pathlib import Path

import requests
from serving import free_port

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += ["--disable-component-update", "--disable-sync", "--window-size=1000,1000"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def available() -> bool:
    return bool(shutil.which("chromedriver") and shutil.which("chromium"))


class Browser:
    """One page."""

    def __init__(self, profile: Path):
        port = free_port()
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        for _ in range(100):
            try:
                reply = requests.post(self.base, json=asked, timeout=60)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        self.base += "/" + reply.json()["value"]["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        requests.delete(self.base, timeout=60)
        self.driver.terminate()
        self.driver.wait(20)

    def open(self, url: str):
        self._post("/url", {"url": url})

    def run(self, script: str):
        """What the script returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str):
        found = self._post("/element", {"using": "css selector", "value": selector})
        self._post(f"/element/{found[ELEMENT]}/value", {"text": text})

    def wait(self, script: str, seconds: float = 30):
        """Until the script returns something true, which is returned."""
        deadline = time.time() + seconds
        while time.time() < deadline:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.2)
        text = self.run("return document.body.innerText")
        raise AssertionError(f"{script}: {value!r} after {seconds} s; the page: {text}")

    def picture(self, file: Path):
        value = requests.get(self.base + "/screenshot", timeout=60).json()["value"]
        file.write_bytes(base64.b64decode(value))

    def _post(self, path: str, body: dict):
        reply = requests.post(self.base + path, json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]
