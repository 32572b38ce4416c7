"""A hub on this machine: the parts of its HTTP API that create a model and commit files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """A model repository: its files and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"


@dataclass
class FakeHub:
    """The state of the hub.

    Args:
        repositories: hub id → repository.
        blobs: SHA-256 → content of large files.
        fails: part of a path → status with which requests to it fail.
        card_errors: what the hub finds wrong with the metadata of a card.
        requests: all requests so far.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fails: dict[str, int] = field(default_factory=dict)
    card_errors: list[dict[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Return the status and the JSON answer of a request."""
        self.requests.append(f"{method} {path}")
        for part, status in self.fails.items():
            if part in path:
                return status, {"error": "refused by the test"}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if path == "/api/validate-yaml":
            status = 400 if self.card_errors else 200
            return status, {"errors": self.card_errors, "warnings": []}
        if token != "Bearer hf_secret":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": self._upload_of(json.loads(body))}
        name, _, rest = path.removeprefix("/api/models/").partition("/")
        owner, name = name, rest.partition("/")[0]
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return 200, {"files": [{**_mode(each["path"]), "path": each["path"]} for each in asked]}
        if "/commit/" in path:
            return self._commit(f"{owner}/{name}", repository, body)
        siblings = [{"rfilename": file} for file in repository.files]
        told = {"id": f"{owner}/{name}", "sha": repository.sha, "siblings": siblings}
        return 200, {**told, "private": repository.private, "tags": [], "_id": "0"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = Repository(private)
        return 200, {"url": f"{self.endpoint}/{name}"}

    def _upload_of(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**each, "actions": {"upload": {"href": f"{self.endpoint}/blob/{each['oid']}"}}}
            for each in asked["objects"]
        ]

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repository.sha):
            return 412, {"error": "not the newest commit"}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del repository.files[value["path"]]
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.blobs[value["oid"]]
            else:
                repository.files[value["path"]] = base64.b64decode(value["content"])
        repository.commits.append(head["summary"])
        url = f"{self.endpoint}/{name}/commit/{repository.sha}"
        return 200, {"commitUrl": url, "commitOid": repository.sha}


def _mode(name: str) -> dict[str, Any]:
    large = name.endswith(".safetensors")
    return {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


@contextmanager
def serving(hub: FakeHub) -> Iterator[None]:
    """Serve the hub at `hub.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            token = self.headers.get("Authorization")
            status, content = hub.answer(self.command, self.path.partition("?")[0], body, token)
            text = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = respond

        def _chunks(self) -> bytes:
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
