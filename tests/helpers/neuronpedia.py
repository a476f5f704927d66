"""What Neuronpedia does with files and uploads, in Python: its importer, and a server for uploads.

The rules are those of `apps/webapp/lib/db/import.ts` and of its database's schema.
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DEFS = json.loads((Path(__file__).parents[1] / "interpretation/pages.schema.json").read_text())[
    "$defs"
]
JSON_TYPES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
    "object": dict, "null": type(None),
}  # fmt: skip


def check(value: Any, schema: Row, where: str = "") -> None:
    """Check a value against the part of JSON Schema that ours uses."""
    if "enum" in schema:
        assert value in schema["enum"], (where, value)
        return
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fits = [n for n in names if isinstance(value, JSON_TYPES[n])]
    assert fits, (where, value)
    assert not isinstance(value, bool) or "boolean" in names, where
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema["required"]) <= set(value), (where, value.keys())
        assert set(value) <= set(schema["properties"]), (where, value.keys())
        for key, each in value.items():
            check(each, schema["properties"][key], f"{where}.{key}")
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9), where
        for each in value:
            check(each, schema["items"], f"{where}[]")
    if isinstance(value, str):
        size = len(value.encode("utf-16-le")) // 2  # as JavaScript counts
        assert schema.get("minLength", 0) <= size <= schema.get("maxLength", 10**9), (where, value)
        assert re.search(schema.get("pattern", ""), value), (where, value)
    if isinstance(value, int | float):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), where


class Imported:
    """The tables of a database after the import of folders."""

    def __init__(self) -> None:
        self.releases: dict[str, Row] = {}
        self.models: dict[str, Row] = {}
        self.sets: dict[tuple[str, str], Row] = {}
        self.sources: dict[tuple[str, str], Row] = {}
        self.neurons: dict[tuple[str, str, str], Row] = {}
        self.activations: dict[str, Row] = {}
        self.explanations: dict[str, Row] = {}

    def add(self, folder: Path) -> None:
        """Import `<model>/<source>`; an error stands for an importer's."""
        model, source = folder.parent.name, folder.name
        for row in _metadata(folder, "release"):
            self.releases.setdefault(row["name"], row)
        for row in _metadata(folder, "model"):
            self.models.setdefault(row["id"], row)
        for row in _metadata(folder, "sourceset"):
            assert row["releaseName"] in self.releases
            assert row["modelId"] in self.models
            self.sets.setdefault((model, row["name"]), row)
        for row in _metadata(folder, "source"):
            assert (row["modelId"], row["setName"]) in self.sets
            assert (row["modelId"], row["id"]) == (model, source)  # the address that is asked for
            self.sources.setdefault((model, row["id"]), row)
        for row in _batches(folder, "features"):
            assert (row["modelId"], row["layer"]) in self.sources
            assert (row["modelId"], row["sourceSetName"]) in self.sets
            self.neurons.setdefault((row["modelId"], row["layer"], row["index"]), row)
        for row in _batches(folder, "activations"):
            assert (row["modelId"], row["layer"], row["index"]) in self.neurons
            assert len(row["tokens"]) == len(row["values"])
            self.activations.setdefault(row["id"], row)
        for row in _batches(folder, "explanations"):
            assert (row["modelId"], row["layer"], row["index"]) in self.neurons
            self.explanations.setdefault(row["id"], row)


def _metadata(folder: Path, name: str) -> list[Row]:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == 1
    for row in rows:
        check(row, DEFS[name], name)
    return rows


def _batches(folder: Path, name: str) -> Iterator[Row]:
    for file in sorted((folder / name).glob("*.jsonl.gz")):
        text = gzip.decompress(file.read_bytes()).decode().replace(r"\u0000", " ")
        lines = text.strip().split("\n")
        columns = json.loads(lines[0]).keys()  # fails on an empty file, as there
        for line in lines:
            row = json.loads(line)
            assert "\\u0000" not in json.dumps(row).replace("\\\\", "")  # jsonb has no NUL
            assert row.keys() == columns  # others would be lost
            check(row, DEFS[name], name)
            yield row


@contextmanager
def upload_server() -> Iterator[tuple[str, list[Row]]]:
    """Serve `POST /api/feature/upload-batch`; yield the API's address and the batches received."""
    received: list[Row] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                assert self.path == "/api/feature/upload-batch"
                assert self.headers["X-Api-Key"] == "key"
                _check_upload(body)
                received.append(body)
                status, answer = 200, {"message": "ok"}
            except AssertionError as error:
                status, answer = 400, {"error": str(error)}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _check_upload(body: Row) -> None:
    assert 1 <= len(body["features"]) <= 128, "features"
    for feature in body["features"]:
        assert isinstance(feature["index"], int)
        assert 0 <= feature["density"] <= 1, "density"
        assert feature["activations"], "activations"
        for each in feature["activations"]:
            assert 1 <= len(each["tokens"]) <= 1024, "tokens"
            assert all(each["tokens"]), "an empty token"
            assert len(each["tokens"]) == len(each["values"]), "values"
            quantile = [each[f"quantile{k}"] for k in ("Max", "Min", "Fraction")]
            assert all(q is None for q in quantile) or all(q is not None for q in quantile)
        for each in feature["explanations"]:
            assert 1 <= len(each["text"]) <= 512, "text"
            assert each["methodName"] is None or each["methodName"], "methodName"
        for side in ("topLogits", "bottomLogits"):
            assert len(feature[side]) <= 20, side
            assert all(each["token"] for each in feature[side]), side
