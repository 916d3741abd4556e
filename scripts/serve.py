"""Serves a model with OpenAI's HTTP API and a chat page: `python scripts/serve.py --checkpoint
DIR`, then http://127.0.0.1:8000.

This file is about HTTP: access, limits, status codes. scripts/completions.py has requests and
responses; generation/service.py has the queue, timeouts and the model.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from scripts.serve_metrics import CHAT_PATH, TEXT_PATH, Metrics
except ImportError as missing:
    sys.exit(f"error: {missing.name} is not installed: run `pip install -r requirements-serve.txt`")

from artifacts.checkpoint import open_checkpoint
from config.compose import add_model_arguments, settings_for_use
from config.errors import UsageError, one_clear_message, refuse_several_ranks
from generation import load
from generation.service import Broken, Closed, Event, Full, Service, ServiceError, TimedOut
from models.device import keep_freed_memory
from scripts.completions import ApiError, ChatCompletion, ChatRequest, Completion, CompletionRequest, invalid, parse_request

PAGE = Path(__file__).with_name("serve_page.html")
KEY_VARIABLE = "TRM_API_KEY"
# Timeout for a client to send its request, or to read a piece of its answer.
_SLOWEST_CLIENT_SECONDS = 30.0
# Many proxies and clients close an idle connection after 30 to 60 s.
_BEAT_SECONDS = 5.0
# Below the usual limit of 1024 open files per process.
_MOST_CONNECTIONS = 900

_T = TypeVar("_T")


@dataclass(frozen=True)
class Access:
    """Access and limits."""

    model: str
    """The model's name in requests."""
    api_key: str | None = None
    any_host: bool = False
    """Without a key: whether to accept host names other than the loopback's."""
    max_request_bytes: int = 256 * 1024
    aliases: tuple[str, ...] = ()
    """Other names of the model."""
    origins: tuple[str, ...] = ()
    """Origins whose web pages may use the server; "*": all."""


def make_app(service: Service, access: Access) -> Starlette:
    """The HTTP application. The caller closes `service`."""
    metrics = Metrics(service)
    api = _Api(service, access, metrics)
    foreign_pages = Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return Starlette(
        routes=[
            Route("/", api.page),
            Route("/health", api.health),
            Route("/metrics", api.metrics),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            *(Route(path, api.complete, methods=["POST"]) for path in (CHAT_PATH, TEXT_PATH)),
        ],
        # A browser's preflight request has no key.
        middleware=[Middleware(metrics.middleware), *([foreign_pages] if access.origins else []), Middleware(_gate, access=access)],
        exception_handlers=dict.fromkeys((ApiError, ServiceError, HTTPException, ClientDisconnect, Exception), _on_error),
    )


def _gate(app: ASGIApp, access: Access) -> ASGIApp:
    """`app`, which gets no request without the key or, if there is none, from another site's web page."""

    def refusal(path: str, headers: Headers) -> ApiError | None:
        if access.api_key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_known = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), access.api_key.encode())
            if path.startswith("/v1/") and not is_known:
                return ApiError(401, "wrong or no API key: send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        elif not access.any_host and not _is_loopback(_host_name(headers.get("host", ""))):
            # DNS rebinding: a page whose name resolves to this machine has the server's origin.
            return ApiError(403, "a server without an API key answers only to localhost, 127.0.0.1 and [::1]", code="wrong_host")
        return None

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        refused = refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (app if refused is None else _error_response(refused))(scope, receive, send)

    return guarded


class _Api:
    """The endpoints."""

    def __init__(self, service: Service, access: Access, metrics: Metrics) -> None:
        self._service = service
        self._access = access
        self._metrics = metrics
        self._created = int(time.time())
        self._html, self._html_headers = _page(
            {
                "model": access.model,
                "needsKey": access.api_key is not None,
                "actSteps": service.responder.options.act_steps,
                "haltThreshold": service.responder.options.halt_threshold,
                "temperature": service.responder.options.sampling.temperature,
                "context": service.responder.context,
            }
        )

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self._html, headers=self._html_headers)

    async def health(self, _: Request) -> Response:
        service = self._service
        about = {"status": "ok", "model": self._access.model, "pending": service.pending, "capacity": service.capacity}
        if service.refusal is None:
            return JSONResponse(about)
        status = "failed" if isinstance(service.refusal, Broken) else "stopping"
        return JSONResponse({**about, "status": status, "message": str(service.refusal)}, 503)

    async def metrics(self, _: Request) -> Response:
        return self._metrics.response()

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model(name) for name in self._names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._about_model(name))

    async def complete(self, request: Request) -> Response:
        service, responder = self._service, self._service.responder
        is_chat = request.url.path == CHAT_PATH
        asked = parse_request(
            await _read_body(request, self._access.max_request_bytes), ChatRequest if is_chat else CompletionRequest
        )
        self._check_model(asked.model)
        options = asked.options(responder.options)
        # In a thread, because encoding a long text takes time.
        prompts, extras = await asyncio.to_thread(asked.prompts, responder)
        answers = len(prompts) * max(1, asked.samples)
        if answers > service.capacity:
            many = "n" if len(prompts) == 1 else asked.param
            raise invalid(f"{answers} answers requested: this server gives at most {service.capacity} answers at a time", many)
        try:
            submission = await service.submit(prompts, options, asked.samples, scored=asked.is_scored)
        except UsageError as error:
            # litellm recognises this wording, and may switch to a model with a longer context.
            raise invalid(f"prompt is too long: {error}", asked.param, "context_length_exceeded") from None
        completion = (ChatCompletion if is_chat else Completion)(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            asked=asked,
            tokenizer=responder.tokenizer,
            prompt_tokens=submission.prompt_tokens,
            seed=options.sampling.seed,
            extras=extras,
        )
        events = self._metrics.observed(service.events(submission, _BEAT_SECONDS), submission.prompt_tokens)
        if asked.stream:
            return _EventStream(_messages(completion, events), lambda: service.cancel(submission))
        try:
            return JSONResponse(completion.whole(await _while_connected(request.receive, _all(events))))
        finally:
            service.cancel(submission)

    @property
    def _names(self) -> tuple[str, ...]:
        return (self._access.model, *self._access.aliases)

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            message = f"there is no model {name!r} here, only {', '.join(map(repr, self._names))}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def _about_model(self, name: str) -> dict[str, Any]:
        responder = self._service.responder
        extras = {"context": responder.context, "act_steps": responder.options.act_steps}
        return {"id": name, "object": "model", "created": self._created, "owned_by": "local", **extras}


# Requests.


async def _read_body(request: Request, limit: int) -> bytes:
    """Read the body. Raises ApiError: 415 for other types, 413 over `limit`, 408 if slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Web pages of other origins may send other types without a preflight request.
        raise ApiError(415, "send the body with `Content-Type: application/json`")
    too_large = ApiError(413, f"the body is larger than {limit} bytes, this server's limit", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_SLOWEST_CLIENT_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_SLOWEST_CLIENT_SECONDS:g} s") from None
    return bytes(body)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`. Raises ClientDisconnect, and cancels it, if the client leaves."""
    working = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        working.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await working
    except asyncio.CancelledError:
        if watching.done():
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


# Responses.


async def _all(events: AsyncIterator[Event | None]) -> list[Event]:
    return [event async for event in events if event is not None]


async def _messages(completion: Completion, events: AsyncIterator[Event | None]) -> AsyncIterator[str]:
    """Server-sent events: a chunk per token, and a comment where there is none for a while. Raises
    the ServiceError that comes before all of them; a later one is a message.
    """
    event = await anext(events)
    for chunk in completion.opening():
        yield _data(chunk)
    try:
        yield _message(completion, event)
        async for event in events:
            yield _message(completion, event)
        for chunk in completion.closing():
            yield _data(chunk)
        yield "data: [DONE]\n\n"
    except ServiceError as error:
        yield _data(_as_api_error(error).body())


class _EventStream(StreamingResponse):
    """A response of messages. `end` is called however it ends, also for a client that doesn't read."""

    def __init__(self, messages: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(messages, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def send_in_time(message: Message) -> None:
            held.append(message)
            # The status waits for the first message, because an error before it has another one.
            if message["type"] != "http.response.start":
                async with asyncio.timeout(_SLOWEST_CLIENT_SECONDS):
                    while held:
                        await send(held.pop(0))

        try:
            with contextlib.suppress(ClientDisconnect, TimeoutError):
                await super().__call__(scope, receive, send_in_time)
        finally:
            self._end()


def _message(completion: Completion, event: Event | None) -> str:
    return ": waiting\n\n" if event is None else _data(completion.chunk(event))


def _data(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


# Errors.

_STATUS_OF: dict[type[ServiceError], tuple[int, str]] = {
    Full: (429, "rate_limit_exceeded"),
    TimedOut: (504, "timeout"),
    Closed: (503, "shutting_down"),
    Broken: (500, "engine_failed"),
}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ServiceError):
        status, code = _STATUS_OF[type(error)]
        return ApiError(status, str(error), code=code)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail)
    return ApiError(500, "the server has failed at this request; see its log")


def _error_response(error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # Only for the access log: nginx's status for a client that left.
    told = _as_api_error(error)
    # There is room again as soon as an answer ends.
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(told.status)
    return JSONResponse(told.body(), told.status, headers)


async def _on_error(_: Request, error: Exception) -> Response:
    return _error_response(error)


# The page.


def _page(settings: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The page with its settings, and headers that allow only its script and this server."""
    html = PAGE.read_text(encoding="utf-8")
    parts = [part for tag in ("script", "style") for part in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)]
    script, style = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    # "<" could end the script element.
    return html.replace("{{settings}}", json.dumps(settings).replace("<", "\\u003c")), headers


# The command.


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; one that others can reach needs an API key")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"key that callers must send; better ${KEY_VARIABLE}, because `ps` shows flags",
    )
    parser.add_argument("--allow-open", action="store_true", help="allow access without a key")
    parser.add_argument("--model-name", nargs="+", help="names that requests may give the model; default: <run>/step_<N>")
    parser.add_argument(
        "--allow-origin", nargs="+", default=[], help="web pages that may use the server: https://host[:port] of each, or * for all"
    )
    parser.add_argument("--queue", type=int, default=64, help="answers that may wait for running ones")
    parser.add_argument("--timeout", type=float, default=120.0, help="limit of seconds from a request to the end of its answer")
    parser.add_argument("--max-request-kb", type=int, default=256, help="largest request, in units of 1024 bytes")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds for running answers to finish when the server stops")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments before loading the model. Raises UsageError."""
    key = arguments.api_key
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UsageError(f"the API key must be of visible ASCII characters without spaces; unset {KEY_VARIABLE} to have none")
    if key is None and not arguments.allow_open and not _is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host} lets everyone who reaches this machine use the model: set a key in {KEY_VARIABLE}, "
            "or pass --allow-open if that is intended"
        )
    for origin in arguments.allow_origin:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UsageError(f"--allow-origin {origin}: expected a scheme and a host without a path, as https://example.org, or *")
    if "*" in arguments.allow_origin and key is None and not arguments.allow_open:
        raise UsageError(
            f"--allow-origin '*' lets every web page use the model: set a key in {KEY_VARIABLE}, "
            "or pass --allow-open if that is intended"
        )
    for flag, value, least in (("queue", arguments.queue, 0), ("max-request-kb", arguments.max_request_kb, 1)):
        if value < least:
            raise UsageError(f"--{flag} {value}: expected at least {least}")
    if not arguments.timeout > 0 or not arguments.grace >= 0:
        raise UsageError("--timeout must be above 0 seconds, --grace not below 0")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to that address. Raises UsageError if that fails."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UsageError(f"can't listen on {host} port {port}: {error}; choose another with --host and --port") from None
    return bound


class Server(uvicorn.Server):
    """Serves until stopped. Running answers then have `grace` seconds to finish; others get 503."""

    def __init__(self, service: Service, access: Access, grace: float = 10.0) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(service, access),
                lifespan="off",
                server_header=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=5,
            )
        )
        self._service = service
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        end = time.monotonic() + self._grace
        while self._service.pending and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        await self._service.close()
        await super().shutdown(sockets)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def main() -> None:
    """Load, report, serve."""
    arguments = parse_arguments()
    refuse_several_ranks()
    check(arguments)
    listening = bind(arguments.host, arguments.port)
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.tokenizer_path)
    responder = load(checkpoint, settings_for_use(checkpoint.config, arguments))
    service = Service(responder, queue=arguments.queue, timeout=arguments.timeout)
    folder = checkpoint.folder.resolve()
    model, *aliases = arguments.model_name or [f"{folder.parent.name}/{folder.name}"]
    access = Access(
        model=model,
        aliases=tuple(aliases),
        api_key=arguments.api_key,
        any_host=arguments.allow_open,
        max_request_bytes=arguments.max_request_kb * 1024,
        origins=tuple(arguments.allow_origin),
    )
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{listening.getsockname()[1]}"
    print(
        f"{access.model}: {service.rows} answers at a time, {arguments.queue} more may wait; the KV cache takes up to "
        f"{service.cache_bytes / 1e9:.3f} GB ({responder.context} positions, {responder.options.act_steps} ACT steps)\n"
        f"chat: {address}/  API: {address}/v1",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        Server(service, access, arguments.grace).run([listening])


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
