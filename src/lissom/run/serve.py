"""An HTTP server that the clients of OpenAI's interface can use: one model, continuous batching, back-pressure.

    GET  /v1/models  /health  /metrics  /          POST /v1/completions  /v1/chat/completions

A client that goes away frees its place at the next step; a full line answers 429; a closing server finishes what runs.
"""

import asyncio
import hmac
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import LissomError
from .engine import ContextError
from .generation import Generation, Runner
from .sampling import RequestError
from .scheduler import BusyError, Job, Scheduler


@dataclass(frozen=True)
class ServerSettings:
    """``keys``: accepted API keys, () = open to all. ``timeout``: seconds of a request, its wait included."""

    name: str = "lissom"
    keys: tuple[str, ...] = ()
    max_tokens: int = 1024
    max_body: int = 1 << 20
    max_prompts: int = 16
    waiting: int = 64
    timeout: float = 300.0
    patience: float = 30.0  # seconds that running requests get at shutdown


class _BodyLimit:
    """Refuses bodies above a size, whether or not their length is announced."""

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, size = [], 0
        while True:  # requests are small: read them whole before anything else happens
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self.most:
                content = json.dumps(
                    _error(f"the body is larger than {self.most} bytes", "invalid_request_error")
                ).encode()
                headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                await send({"type": "http.response.body", "body": content})
                return
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        messages.reverse()

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


def _error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class _Service:
    """The requests in flight."""

    def __init__(self, runner: Runner, settings: ServerSettings):
        self.runner, self.settings = runner, settings
        self.scheduler = Scheduler(runner, waiting=settings.waiting)
        self.counts: dict[int, int] = {}
        self.first_tokens, self.first_seconds = 0, 0.0
        self._encoding = threading.Lock()

    def jobs(self, request: Any, tell: Callable[[int, Job, str, bool], None]) -> list[Job]:
        """Encode and check every choice of a request; nothing is submitted yet."""
        prompts = request.prompts()
        count = len(prompts) * (request.n or 1)
        if not prompts or count > self.settings.max_prompts:
            raise RequestError(f"a request may have 1 … {self.settings.max_prompts} prompts × n, not {count}")
        out: list[Job] = []
        for prompt in prompts:
            try:
                with self._encoding:
                    ids = self.runner.encode(prompt)
            except (TypeError, UnicodeError, OverflowError) as error:  # lone surrogates and the like
                raise RequestError(f"the prompt is not text that can be encoded: {error}") from error
            for _ in range(request.n or 1):
                index = len(out)
                how = request.sampling(self.settings.max_tokens, index)
                out.append(self.scheduler.job(ids, how, lambda job, text, done, i=index: tell(i, job, text, done)))
        return out

    def submit(self, jobs: list[Job]) -> None:
        try:
            for job in jobs:
                self.scheduler.submit(job)
        except BusyError:
            self.cancel(jobs)
            raise

    def cancel(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.scheduler.cancel(job)

    def metrics(self) -> str:
        s = self.scheduler
        rows = [
            ("lissom_prompt_tokens_total", "counter", "Prompt tokens read", s.tokens_read),
            ("lissom_generated_tokens_total", "counter", "Tokens generated", s.tokens_made),
            ("lissom_sequences_finished_total", "counter", "Sequences that ended", s.finished),
            ("lissom_sequences_running", "gauge", "Sequences in the engine", len(s.running)),
            ("lissom_sequences_waiting", "gauge", "Sequences in the line", len(s.waiting)),
            ("lissom_cache_positions_free", "gauge", "Free positions of the cache", self.runner.engine.free_positions),
            ("lissom_first_token_seconds_sum", "counter", "Seconds to first tokens", round(self.first_seconds, 6)),
            ("lissom_first_token_seconds_count", "counter", "First tokens", self.first_tokens),
        ]
        lines = [f"# HELP {n} {text}\n# TYPE {n} {kind}\n{n} {value}" for n, kind, text, value in rows]
        lines.append("# HELP lissom_requests_total Answers by status\n# TYPE lissom_requests_total counter")
        lines += [f'lissom_requests_total{{status="{k}"}} {v}' for k, v in sorted(self.counts.items())]
        return "\n".join(lines) + "\n"


def build_app(runner: Runner, settings: ServerSettings | None = None) -> Any:
    """The FastAPI application; ``app.state.service`` holds the scheduler. Needs the extra ``lissom[serve]``."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise LissomError("the server needs FastAPI and uvicorn: pip install 'lissom[serve]'") from error
    from .api import Answer, ChatRequest, CompletionRequest

    settings = settings or ServerSettings()
    service = _Service(runner, settings)

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await run_in_threadpool(service.scheduler.close, settings.patience)

    app = FastAPI(title="lissom", lifespan=life)
    app.state.service = service

    def refuse(status: int, message: str, kind: str = "invalid_request_error", headers: Any = None) -> Any:
        return JSONResponse(_error(message, kind), status, headers=headers)

    @app.middleware("http")
    async def guard(request: Request, call: Any) -> Any:
        if settings.keys and request.url.path.startswith("/v1/"):
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(key.encode(), k.encode()) for k in settings.keys]
            if scheme.lower() != "bearer" or not any(known):
                service.counts[401] = service.counts.get(401, 0) + 1
                return refuse(401, "a valid API key is needed: Authorization: Bearer …", "authentication_error")
        response = await call(request)
        service.counts[response.status_code] = service.counts.get(response.status_code, 0) + 1
        return response

    app.add_middleware(_BodyLimit, most=settings.max_body)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Any:
        details = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()[:10])
        return refuse(400, details.encode("utf-8", "replace").decode())

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Any:
        return refuse(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(LissomError)
    async def failed(_: Request, error: LissomError) -> Any:
        if isinstance(error, BusyError):
            return refuse(429, str(error), "rate_limit_error", {"Retry-After": "1"})
        status = 400 if isinstance(error, RequestError | ContextError) else 500
        return refuse(status, str(error), "invalid_request_error" if status == 400 else "server_error")

    async def complete(request: Any, http_request: Request, chat: bool) -> Any:
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(index: int, job: Job, text: str, done: bool) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, job, text, done))

        jobs = await run_in_threadpool(service.jobs, request, tell)
        answer = Answer(chat, settings.name)
        deadline = time.monotonic() + settings.timeout
        service.submit(jobs)

        async def pieces() -> AsyncIterator[tuple[int, Job, str, bool]]:
            left = len(jobs)
            try:
                while left:
                    try:
                        item = await asyncio.wait_for(events.get(), 1.0)
                    except TimeoutError:
                        if await http_request.is_disconnected():
                            return
                        if time.monotonic() > deadline:
                            raise TimeoutError from None
                        continue
                    left -= item[3]
                    if item[3] and item[1].first is not None:
                        service.first_tokens += 1
                        service.first_seconds += item[1].first
                    if item[1].error is not None:
                        raise item[1].error
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    yield item
            finally:
                service.cancel(jobs)

        results: list[Generation] = [job.result for job in jobs]
        if not request.stream:
            try:
                async for _ in pieces():
                    pass
            except TimeoutError:
                return refuse(504, f"the request took longer than {settings.timeout:g} s", "timeout_error")
            return JSONResponse(answer.whole(results))

        async def events_of() -> AsyncIterator[str]:
            def line(data: Any) -> str:
                return f"data: {json.dumps(data)}\n\n"

            started = set()
            try:
                async for index, job, text, done in pieces():
                    finish = job.result.finish if done else None
                    yield line(answer.piece(index, text, finish, index not in started))
                    started.add(index)
            except TimeoutError:
                yield line(_error(f"the request took longer than {settings.timeout:g} s", "timeout_error"))
                return
            except LissomError as error:
                yield line(_error(str(error), "server_error"))
                return
            if request.usage_in_stream:
                yield line(answer.last(results))
            yield "data: [DONE]\n\n"

        return StreamingResponse(events_of(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http_request: Request) -> Any:
        return await complete(request, http_request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http_request: Request) -> Any:
        return await complete(request, http_request, chat=True)

    @app.get("/v1/models")
    async def models() -> Any:
        entry = {"id": settings.name, "object": "model", "created": 0, "owned_by": "lissom"}
        return {"object": "list", "data": [entry | {"max_model_len": runner.engine.longest}]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "running": len(service.scheduler.running), "waiting": len(service.scheduler.waiting)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Any:
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Any:
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

    return app


def serve(runner: Runner, host: str = "127.0.0.1", port: int = 8000, settings: ServerSettings | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Raises :class:`LissomError` when the port is taken."""
    settings = settings or ServerSettings()
    app = build_app(runner, settings)
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise LissomError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port") from error
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(settings.patience) + 1)
        uvicorn.Server(config).run(sockets=[listener])
