"""The server through the official client: streams, limits, keys, clients that vanish, shutdown, nonsense."""

import asyncio
import json
import socket
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lissom.core import LissomError
from lissom.kernels import extension
from lissom.run.generation import Runner, generate
from lissom.run.serve import ServerSettings, build_app, serve
from tiny import tiny_model

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")
pytestmark = pytest.mark.skipif(extension is None, reason="needs the C++ extension")

KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    tiny_model("llama", path, max_position_embeddings=2048)
    return Runner(path, context=4096, slots=4, threads=1)


class Server:
    """uvicorn in a thread."""

    def __init__(self, runner, **options):
        self.app = build_app(runner, ServerSettings(name="tiny", **options))
        config = uvicorn.Config(self.app, port=0, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        self.scheduler = self.app.state.service.scheduler
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def server(runner):
    with Server(runner, keys=("other", KEY), max_tokens=1500, max_body=20_000, max_prompts=4) as running:
        yield running


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_completions_equal_generate(server, runner):
    expected = generate(runner_alone(runner), "The value", max_tokens=20)
    got = server.client.completions.create(model="tiny", prompt="The value", max_tokens=20, temperature=0)
    assert got.choices[0].text == expected.text and got.choices[0].finish_reason == expected.finish
    assert got.usage.completion_tokens == len(expected.tokens)
    stream = server.client.completions.create(
        model="tiny", prompt="The value", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text


def runner_alone(runner):
    from lissom.run.engine import Engine

    return Runner(Engine(runner.engine.parts, context=512, threads=1))


def test_chat_streams_with_usage(server):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "What is a class?"}], "max_tokens": 15, "seed": 4}
    whole = server.client.chat.completions.create(**ask)
    chunks = list(server.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_many_choices(server):
    got = server.client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=8, seed=1, temperature=1.5)
    assert [c.index for c in got.choices] == [0, 1, 2, 3] and got.choices[0].text != got.choices[1].text
    ids = server.client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=3)
    assert ids.usage.prompt_tokens == 3


def test_models_health_metrics_and_page(server):
    assert [m.id for m in server.client.models.list()] == ["tiny"]
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    text = httpx.get(f"{server.url}/metrics").text
    assert "# TYPE lissom_generated_tokens_total counter" in text and 'lissom_requests_total{status="200"}' in text
    assert "<title>lissom</title>" in httpx.get(f"{server.url}/").text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "allows 1500"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 5}, "prompts"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt": list(range(300)) * 10}, "context"),
        ({"prompt": [10**6]}, "token ids"),
        ({"prompt": "\ud800"}, "text"),
        ({"stop": ""}, "stop"),
    ],
)
def test_bad_requests_are_answered_400(server, change, says):
    body = json.dumps({"model": "tiny", "prompt": "x", **change})
    reply = httpx.post(f"{server.url}/v1/completions", content=body, headers=HEADERS)
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


def test_keys_and_sizes(server):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.completions.create(model="tiny", prompt="x" * 30_000)
    assert caught.value.status_code == 413


def test_a_client_that_vanishes_frees_its_place(server):
    stream = server.client.completions.create(
        model="tiny", prompt="go", max_tokens=1500, stream=True, temperature=1.0, seed=2
    )
    next(iter(stream))
    stream.close()
    assert wait_until(lambda: not server.scheduler.running)
    assert len(server.scheduler._free) == 4


def test_a_full_line_is_answered_429_and_shutdown_finishes_what_runs(runner):
    with Server(runner, waiting=1) as server:

        async def burst():
            async with httpx.AsyncClient(timeout=30) as client:
                body = {"prompt": "statement", "max_tokens": 400, "temperature": 1.2, "seed": 1, "n": 1}
                return await asyncio.gather(
                    *(client.post(f"{server.url}/v1/completions", json=body | {"seed": i}) for i in range(24))
                )

        replies = asyncio.run(burst())
        codes = [r.status_code for r in replies]
        assert set(codes) <= {200, 429} and 429 in codes and codes.count(200) >= 4
        assert all(r.headers["Retry-After"] == "1" for r in replies if r.status_code == 429)
        late = {}
        body = {"prompt": "statement", "max_tokens": 300, "temperature": 1.2, "seed": 3}
        asking = threading.Thread(
            target=lambda: late.update(r=httpx.post(f"{server.url}/v1/completions", json=body, timeout=30))
        )
        asking.start()
        wait_until(lambda: bool(server.scheduler.running) or bool(late))
    asking.join(10)
    assert late["r"].status_code == 200
    assert runner.engine.free_positions >= 4096


def test_timeouts_are_answered_504(runner):
    with Server(runner, timeout=0.0) as server:
        reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "go", "max_tokens": 1000, "seed": 2})
        assert reply.status_code == 504 and reply.json()["error"]["type"] == "timeout_error"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = [
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "stream",
    "logprobs",
]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(_FIELDS), _JSON), chat=st.booleans(), raw=st.none() | st.binary(max_size=40)
)
def test_nonsense_never_gives_500(server, fields, chat, raw):
    base = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    content = (
        raw if raw is not None else json.dumps({**base, "max_tokens": 2, **fields}).encode("utf-8", "surrogatepass")
    )
    path = "chat/completions" if chat else "completions"
    reply = httpx.post(f"{server.url}/v1/{path}", content=content, headers=HEADERS, timeout=20)
    assert reply.status_code < 500, (reply.text, content)


def test_a_port_in_use_is_named(runner):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LissomError, match="cannot listen"):
            serve(runner, port=taken.getsockname()[1])
