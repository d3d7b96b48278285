"""schemathesis: requests made from the OpenAPI schema, valid and not, never give a 500."""

import contextlib
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from lissom.kernels import extension
from lissom.run.generation import Runner
from lissom.run.serve import ServerSettings, build_app
from tiny import tiny_model

schemathesis = pytest.importorskip("schemathesis")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(extension is None, reason="needs the C++ extension")]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    tiny_model("llama", path)
    app = build_app(
        Runner(path, context=512, slots=4, threads=1), ServerSettings(name="tiny", max_tokens=8, timeout=20)
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    server.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_gives_500(schema, mode):
    paths = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        paths.add(operation.path)

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def ask(case):
            case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])

        with contextlib.suppress(Unsatisfiable):  # paths without parameters have no wrong requests
            ask()
    assert {"/v1/completions", "/v1/chat/completions", "/health"} <= paths
