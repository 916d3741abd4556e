"""The server's Prometheus metrics: waiting and running answers, tokens, requests and their latency.

Knows nothing of the content of requests and answers.
"""

import time
from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from generation.service import ChoiceDelta, Event, Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        running = Gauge("trm_answers_running", "Running answers", registry=self._registry)
        running.set_function(lambda: service.running)
        waiting = Gauge("trm_answers_waiting", "Waiting answers", registry=self._registry)
        waiting.set_function(lambda: max(0, service.pending - service.running))
        self._prompt_tokens = Counter("trm_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._new_tokens = Counter("trm_generated_tokens", "Tokens of answers, EOS included", registry=self._registry)
        self._first_token = Histogram(
            "trm_time_to_first_token_seconds",
            "From a prompt to its answer's first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "trm_request_seconds",
            "From a request to the end of its response",
            ("endpoint", "status"),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def response(self) -> Response:
        """All metrics in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def observed(self, arriving: AsyncIterator[Event | None], prompt_tokens: int) -> AsyncIterator[Event | None]:
        """Count the events of `arriving` while passing them on."""
        begin = time.monotonic()
        self._prompt_tokens.inc(prompt_tokens)
        is_first = True
        async for event in arriving:
            if isinstance(event, ChoiceDelta):
                if is_first:
                    self._first_token.observe(time.monotonic() - begin)
                    is_first = False
                self._new_tokens.inc()
            yield event

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, with timed requests for answers. A client that left has status 499."""

        async def timed(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] not in (CHAT_PATH, TEXT_PATH):
                return await app(scope, receive, send)
            begin, status = time.monotonic(), 499

            async def send_and_note(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, send_and_note)
            finally:
                self._duration.labels(scope["path"], str(status)).observe(time.monotonic() - begin)

        return timed
