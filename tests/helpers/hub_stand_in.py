"""A stand-in for the Hugging Face Hub: an HTTP server on this machine with the calls that count.

It speaks the Hub's protocol, so that huggingface_hub itself runs against it: making a
repository, asking how files are sent, LFS batches, commits, listings and downloads.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

WRITER, READER = "hf_may_write", "hf_may_read"


class Hub:
    """What the server holds: name -> list of (commit, path -> content); the last is `main`."""

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.branches: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self.calls: list[str] = []
        self.url = ""

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and files of a revision."""
        branches = {name: of for (owner, name), of in self.branches.items() if owner == repo}
        branches["main"] = self.repos[repo]
        if revision in branches:
            return branches[revision][-1]
        wanted = self.tags.get(revision, revision)
        every = (each for commits in branches.values() for each in commits)
        return next((each for each in every if each[0] == wanted), None)

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit; return its id."""
        commits = self.repos[repo] if branch == "main" else self.branches[repo, branch]
        number = f"{len(commits)}{repo}{branch if branch != 'main' else ''}"
        oid = hashlib.sha1(number.encode()).hexdigest()
        commits.append((oid, files))
        return oid


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    # ---- answers ----------------------------------------------------------------------------

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", headers.get("X-Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(status, json.dumps({"error": code}).encode(), headers)

    # ---- requests ---------------------------------------------------------------------------

    def _begin(self) -> tuple[str, bytes, str]:
        path = unquote(urlparse(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return path, body, token

    def do_PUT(self) -> None:
        """Take an LFS object."""
        path, body, _ = self._begin()
        self.hub.objects[path.rsplit("/", 1)[1]] = body
        self._send(200, b"", {})

    def do_POST(self) -> None:
        """Make repositories, take commits."""
        path, body, token = self._begin()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif token not in (WRITER, READER):
            self._refuse(401, "Unauthorized")
        elif token != WRITER:
            self._refuse(403, "Forbidden")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/\w+", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/branch/(\w+)", path):
            known = (found[1], found[2]) in self.hub.branches
            if not known:
                self.hub.branches[found[1], found[2]] = list(self.hub.repos[found[1]])
            self._json({}, 409 if known else 200)
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", path):
            self._commit(found[1], found[2], body)
        else:
            self._refuse(404, "NotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        known = repo in self.hub.repos
        if not known:
            self.hub.repos[repo] = []
            self.hub.commit(repo, {".gitattributes": b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self._json({"url": f"{self.hub.url}/{repo}"}, 409 if known else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        self._json(
            {
                "transfer": "basic",
                "objects": [
                    {
                        **each,
                        "actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}},
                    }
                    for each in asked["objects"]
                ],
            }
        )

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        before = self.hub.files(repo, branch) if self.hub.repos[repo] else None
        files = dict(before[1]) if before else {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit(repo, files, branch)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}"})

    def do_GET(self) -> None:
        """Tell of repositories and send files."""
        path, _, token = self._begin()
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.+)?)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = found or file
        repo = match[1] if match else ""
        if repo not in self.hub.repos or (repo in self.hub.private and not token):
            self._refuse(401 if not token else 404, "RepoNotFound")
            return
        at = self.hub.files(repo, ((found[3] if found else file[2]) if match else "") or "main")
        if at is None:
            self._refuse(404, "RevisionNotFound")
        elif found and found[4]:  # a folder: there are none
            self._refuse(404, "EntryNotFound")
        elif found and found[2] == "tree":
            self._json([self._entry(name, content) for name, content in at[1].items()])
        elif found:
            self._json({"id": repo, "sha": at[0], "siblings": [], "private": False, "tags": []})
        elif file and file[3] in at[1]:
            content = at[1][file[3]]
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": at[0]}
            self._send(200, content, headers)
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    @staticmethod
    def _entry(name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


def ask(hub: Hub, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let huggingface_hub ask this Hub, with a cache of its own in a folder."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    # made once a process, for the endpoint of that moment
    patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", WRITER)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
