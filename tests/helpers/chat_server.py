"""A local server that speaks OpenAI's chat completions, well or badly."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any]], str]


class ChatServer:
    """Answers every prompt by a function; `faults` come first, one for each request.

    A fault is a status code, or `malformed`, `truncated`, `empty`, `no_choices`, `slow`.

    Attributes:
        bodies: the request bodies that were answered well.
        authorizations: the headers that were sent.
    """

    def __init__(
        self, answer: Answer, faults: list[Any] | None = None, *, probabilities: bool = True,
        key: str | None = None, stay: float = 0.0,
    ) -> None:  # fmt: skip
        self.answer, self.faults, self.probabilities = answer, list(faults or []), probabilities
        self.key, self.stay = key, stay
        self.bodies: list[dict[str, Any]] = []
        self.requests = 0
        self.authorizations: list[str | None] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._handle(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def repeated(self) -> int:
        """Return how many requests were paid for more than once."""
        counts = Counter(json.dumps(body, sort_keys=True) for body in self.bodies)
        return sum(count - 1 for count in counts.values())

    def _handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.requests += 1
            self.authorizations.append(handler.headers.get("Authorization"))
            fault = self.faults.pop(0) if self.faults else None
        time.sleep(self.stay)
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            said = f"Incorrect API key provided: {handler.headers.get('Authorization')}"
            return self._send(handler, 401, json.dumps({"error": {"message": said}}).encode())
        if isinstance(fault, int):
            headers = {"Retry-After": "7"} if fault == 429 else {}
            return self._send(handler, fault, b"sorry", headers)
        if fault == "slow":
            time.sleep(1.5)
        reply = self._reply(body)
        data = json.dumps(reply).encode()
        if fault == "malformed":
            data = b"<html>gateway</html>"
        elif fault == "empty":
            data = b""
        elif fault == "no_choices":
            data = b'{"choices": []}'
        if fault == "truncated":
            return self._send(handler, 200, data[: len(data) // 2], length=len(data))
        if fault is None:
            with self._lock:
                self.bodies.append(body)
        return self._send(handler, 200, data)

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][0]["content"]
        text = self.answer(prompt, body)
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and self.probabilities:
            other = {"yes": "no", "no": "yes"}.get(text, "well")
            tops = [{"token": text, "logprob": -0.1}, {"token": other, "logprob": -2.4}]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, data: bytes,
        headers: dict[str, str] | None = None, length: int | None = None,
    ) -> None:  # fmt: skip
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.send_header("Connection", "close")
        handler.close_connection = True
        handler.end_headers()
        try:
            handler.wfile.write(data)
        except OSError:  # the client has gone
            handler.close_connection = True
