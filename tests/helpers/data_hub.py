"""A stand-in for the Hub's data sets: an HTTP server on this machine that fails on request.

It speaks what `datasets` asks for in streaming mode: the commit, listings, files in ranges. So the
real stack runs against it, and every trouble comes over a real connection.
"""

import gzip
import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
from pyarrow import parquet

SHA = "a" * 40
NAME = "some/data"


class DataHub:
    """What the server holds and how it misbehaves.

    Attributes:
        files: path -> content.
        sha: the commit that they are of.
        troubles: what happens to the next requests for a file's content, first come first served;
            None answers as it should.
        down: files whose content nobody gets.
        calls: method, path and range of every request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.sha = files, SHA
        self.troubles: list[Callable[[Handler, bytes, int], None] | None] = []
        self.down: set[str] = set()
        self.calls: list[str] = []
        self.url = ""
        self.released = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: DataHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """Send a complete answer; `length` claims another length than the body has."""
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        """Send JSON."""
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def drop(self) -> None:
        """Close the connection."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self) -> None:
        """Tell of the paths that are asked for."""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlparse(self.path).path)
        self.hub.calls.append(f"POST {path}")
        if "/paths-info/" in path:
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(body)["paths"]
            else:
                asked = [
                    unquote(p.split("=")[1]) for p in body.decode().split("&") if "paths=" in p
                ]
            self.json([self._entry(name) for name in asked if name in self.hub.files])
        else:
            self.json({"error": "no"}, 404)

    def do_GET(self) -> None:
        """Tell of the data set and send files."""
        path = unquote(urlparse(self.path).path)
        self.hub.calls.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if re.fullmatch(rf"/api/datasets/{NAME}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.json(
                {
                    "id": NAME,
                    "sha": self.hub.sha,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
            )
        elif found := re.fullmatch(rf"/api/datasets/{NAME}/tree/[^/]+/?(.*)", path):
            inside = found[1] and found[1] + "/"
            self.json([self._entry(n) for n in self.hub.files if n.startswith(inside)])
        elif found := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.+)", path):
            if found[1] in self.hub.down and self.command == "GET":
                self.drop()
            elif found[1] in self.hub.files:
                self._file(self.hub.files[found[1]])
            else:
                self.send(404, b"{}", X_Error_Code="EntryNotFound")
        else:
            self.json({"error": "no"}, 404)

    do_HEAD = do_GET  # noqa: N815

    def _file(self, content: bytes) -> None:
        start, end = 0, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        if start >= len(content):
            self.send(416, b"", Content_Range=f"bytes */{len(content)}")
            return
        body = content[start:end]
        trouble = None
        if self.command == "GET" and self.hub.troubles:
            trouble = self.hub.troubles.pop(0)
        if trouble is not None:
            trouble(self, body, start)
        else:
            self.good(body, start, len(content))

    def good(self, body: bytes, start: int, size: int) -> None:
        """Send what was asked for."""
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": self.hub.sha}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{size}"
        self.send(206 if "Range" in self.headers else 200, body, **headers)

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


def files_of(texts: list[str], form: str) -> dict[str, bytes]:
    """Return texts as two files of a data set: parquet, jsonl or jsonl.gz."""
    half, files = len(texts) // 2, {}
    for number, part in enumerate((texts[:half], texts[half:])):
        if form == "parquet":
            sink = io.BytesIO()
            table = pa.table({"text": part})
            parquet.write_table(table, sink, row_group_size=100, compression="none")
            content = sink.getvalue()
        else:
            content = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
            content = gzip.compress(content, mtime=0) if form.endswith("gz") else content
        files[f"train-0000{number}-of-00002.{form}"] = content
    return files


def status(code: int, **headers: str) -> Callable[[Handler, bytes, int], None]:
    """Answer with an error."""
    return lambda handler, _body, _start: handler.send(code, b"{}", **headers)


def closed(handler: Handler, _body: bytes, _start: int) -> None:
    """Close the connection without a word."""
    handler.drop()


def cut(handler: Handler, body: bytes, start: int) -> None:
    """Promise the complete body and close in the middle."""
    handler.send_response(206 if "Range" in handler.headers else 200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.drop()


def short(handler: Handler, body: bytes, start: int) -> None:
    """Send half, and promise no more."""
    half = body[: len(body) // 2]
    handler.good(half, start, start + len(half))


def silent(handler: Handler, _body: bytes, _start: int) -> None:
    """Take the request and never answer."""
    handler.hub.released.wait(60)
    handler.drop()


def stuck(handler: Handler, body: bytes, _start: int) -> None:
    """Stop in the middle and keep the connection."""
    handler.send_response(206 if "Range" in handler.headers else 200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.hub.released.wait(60)
    handler.drop()


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[DataHub]:
    """Serve a data set on a free port of this machine."""
    hub = DataHub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
