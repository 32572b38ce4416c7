"""A local hub that serves a folder at a single commit to `datasets`."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

COMMIT = "a" * 40
_ADDRESS = re.compile(
    r"/(?:api/)?datasets/([\w.-]+/[\w.-]+)(?:/(resolve|revision|tree|paths-info)/([^/?]+)(?:/([^?]*))?)?"
)


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serve the data sets `root/OWNER/NAME` and yield the address."""

    class Hub(_Hub):
        folder = root

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match = _ADDRESS.match(self.path)
        if match is None or not (self.folder / match[1]).is_dir():
            return self._refuse("RepoNotFound")
        place, asked, revision = self.folder / match[1], match[2], match[3]
        if revision not in (None, "main", COMMIT):
            return self._refuse("RevisionNotFound")
        if asked == "resolve":
            return self._file(place / match[4])
        if asked in (None, "revision"):
            return self._say_json({"id": match[1], "sha": COMMIT, "tags": [], "siblings": []})
        if asked == "tree":
            below = place / (match[4] or "")
            is_deep = "recursive=true" in self.path.lower()
            found = below.rglob("*") if is_deep else below.glob("*")
            return self._say_json([_entry(place, path) for path in sorted(found)])
        paths = [place / path for path in parse_qs(sent.decode()).get("paths", ())]
        return self._say_json([_entry(place, path) for path in paths if path.exists()])

    do_GET = do_HEAD = do_POST = _answer

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._refuse("EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self._say(200, content, headers)
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._say(206, content[first : last + 1], headers)

    def _refuse(self, code: str) -> None:
        self._say(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _say_json(self, value: object) -> None:
        self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(place: Path, path: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    oid = "0" * 40 if path.is_dir() else hashlib.sha1(path.read_bytes()).hexdigest()
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "path": path.relative_to(place).as_posix(), "size": size, "oid": oid}
