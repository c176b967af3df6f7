"""A Hugging Face hub of a few routes on 127.0.0.1, for tests without a network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class FakeHub:
    """Repositories as {name: {revision: {path: content}}}, and what was asked for."""

    repositories: dict[str, dict[str, Files]]
    gated: frozenset[str] = frozenset()
    fetched: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, name: str, revision: str) -> str | None:
        """The commit hash a branch, a tag or the hash itself stands for."""
        for known in self.repositories[name]:
            digest = hashlib.sha1(f"{name}@{known}".encode()).hexdigest()
            if revision in (known, digest):
                return digest
        return None

    def files(self, name: str, revision: str) -> Files:
        commit = self.commit(name, revision)
        return next(f for r, f in self.repositories[name].items() if self.commit(name, r) == commit)


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run `hub` until the block ends; `hub.url` is its endpoint."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if name not in self.hub.repositories:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if name in self.hub.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        kind, revision, path = (*rest, "", "")[:3] if rest else ("revision", "main", "")
        path = "/".join(rest[2:])
        commit = self.hub.commit(name, revision)
        if commit is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.files(name, revision)
        if api and kind == "revision":
            return self.send_json({"id": name, "sha": commit, "siblings": []}, with_body)
        if api and kind == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.send_json(tree, with_body)
        if kind == "resolve" and path in files:
            if with_body:
                self.hub.fetched.append(path)
            content = files[path]
            etag = hashlib.sha1(content).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            return self.send(200, content, headers, with_body=with_body)
        return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send_json(self, value: object, with_body: bool) -> None:
        self.send(200, json.dumps(value).encode(), {}, with_body=with_body)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Stay quiet."""
