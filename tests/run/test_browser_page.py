"""The page at / in a headless Chromium, driven over its debugging pipe."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time

import pytest

from lissom.kernels import extension
from lissom.run.generation import Runner, generate
from lissom.run.serve import ServerSettings, build_app
from tiny import tiny_model

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(b)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(extension is None, reason="needs the C++ extension"),
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]


class Browser:
    """One tab. Messages of the DevTools protocol end with a zero byte on two pipes."""

    def __init__(self, profile):
        read_in, self._out = os.pipe()
        self._in, write_out = os.pipe()

        def wire():
            os.dup2(read_in, 3)
            os.dup2(write_out, 4)

        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_in)
        os.close(write_out)
        self._count, self._buffer, self.session, self.logged = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Runtime.enable")
        self.call("Page.enable")

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = os.read(self._in, 65536)
                assert data, "the browser ended"
                self._buffer += data
            raw, _, self._buffer = self._buffer.partition(b"\0")
            reply = json.loads(raw)
            if reply.get("method") == "Runtime.exceptionThrown":
                self.logged.append(reply["params"]["exceptionDetails"])
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, seconds=30):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def close(self):
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        self.process.wait(20)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    path = tmp_path_factory.mktemp("page")
    tiny_model("llama", path, max_position_embeddings=2048)
    return Runner(path, context=4096, slots=2, threads=1)


@pytest.fixture(scope="module")
def url(runner):
    app = build_app(runner, ServerSettings(name="tiny", keys=("k",), max_tokens=1500))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def tab(tmp_path, url):
    browser = Browser(tmp_path)
    browser.call("Page.navigate", url=url)
    browser.wait("document.readyState === 'complete' && !!document.getElementById('go')")
    yield browser
    browser.close()
    assert browser.logged == []  # no script failed


def test_the_page_streams_stops_and_shows_errors(tab, runner, url):
    fill = "(id, value) => document.getElementById(id).value = value"
    text = "document.getElementById('{}').textContent"
    ready = "!document.getElementById('go').disabled"
    send = "document.getElementById('go').click()"
    # without a key the server's message is shown
    tab.run(send)
    tab.wait(f"{ready} && {text.format('speed')}.includes('API key')")
    # a greedy answer is that of generate
    for name, value in (("key", "k"), ("temperature", "0"), ("tokens", "12"), ("prompt", "What is a class?")):
        tab.run(f"({fill})('{name}', '{value}')")
    tab.run(send)
    tab.wait(f"{ready} && {text.format('speed')}.includes('tokens/s')")
    expected = generate(
        Runner(runner.engine.parts, context=512, threads=1),
        [{"role": "user", "content": "What is a class?"}],
        max_tokens=12,
    )
    assert tab.run(text.format("answer")) == expected.text
    # Stop ends a long answer and frees its place
    for name, value in (("temperature", "2"), ("tokens", "1500")):
        tab.run(f"({fill})('{name}', '{value}')")
    tab.run(send)
    tab.wait(f"{text.format('answer')}.length > 0")
    tab.run("document.getElementById('stop').click()")
    tab.wait(ready)
    tab.wait("fetch('/health').then(r => r.json()).then(j => j.running === 0)")
    # markup in answers is text
    assert tab.run("document.getElementById('answer').children.length") == 0
