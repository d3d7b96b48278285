"""schemathesis: requests made from the OpenAPI schema, valid and not, never give a 500."""

import pytest
from hypothesis import HealthCheck, settings

from lissom.kernels import extension
from lissom.run.generation import Runner
from lissom.run.serve import ServerSettings, build_app
from tiny import tiny_model

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(extension is None, reason="needs the C++ extension")]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    tiny_model("llama", path)
    runner = Runner(path, context=512, slots=4, threads=1)
    app = build_app(runner, ServerSettings(name="tiny", max_tokens=8, timeout=20))
    app.state.service.scheduler.start()
    yield app
    app.state.service.scheduler.close(5)


@pytest.fixture(scope="module")
def schema(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app)


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_gives_500(case):
    case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])
