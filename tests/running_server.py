"""scripts/serve.py in a thread, for the tests of what its callers meet."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai

from generation.answers import Responder
from generation.service import Service
from scripts import serve

KEY = "a-key"
MODEL = "run/step_1"
QUESTION = [{"role": "user", "content": "What is 2 plus 3"}]
ASK = {"model": MODEL, "messages": QUESTION, "max_tokens": 5}
CHAT = "/v1/chat/completions"
WAIT = 20.0


class Running:
    """A server on a free port, in a thread."""

    def __init__(
        self, responder: Responder, access: serve.Access, queue: int = 8, timeout: float = 60.0, grace: float = 0.0
    ) -> None:
        self.service = Service(responder, queue=queue, timeout=timeout)
        self.server = serve.Server(self.service, access, grace)
        listening = serve.bind("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, args=([listening],))
        self._thread.start()
        wait_for(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(WAIT)
        assert not self._thread.is_alive()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT)

    def post(self, body: Any = None, path: str = CHAT, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(ASK if body is None else body)
        sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        return httpx.post(self.url + path, content=content, headers=sent, timeout=WAIT)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
