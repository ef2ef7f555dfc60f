"""As much of a Weights & Biases server, on loopback, as the real client needs to finish a run."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """Takes every run, and keeps what is sent of its history; or knows no key, on request."""

    daemon_threads = True

    def __init__(self, *, refuses_keys: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses_keys = refuses_keys
        self._connections: list[socket.socket] = []
        self._is_dead = False
        self.configs: list[dict[str, Any]] = []
        self.uploads: list[str] = []
        self.streams: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the rows that have arrived."""
        files = [stream.get("files", {}).get("wandb-history.jsonl") for stream in self.streams]
        return [json.loads(line) for file in files if file for line in file["content"]]

    @property
    def exit_codes(self) -> list[int]:
        """Return how the runs ended."""
        return [stream["exitcode"] for stream in self.streams if stream.get("complete")]

    def die(self) -> None:
        """Cut all connections and refuse new ones; a second call does nothing."""
        if self._is_dead:
            return
        self._is_dead = True
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Remember the connections."""
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients hang up without a word on stderr."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            self._answer({"data": self._query(json.loads(body))})
        else:
            if self.path.endswith("/file_stream"):
                self.server.streams.append(json.loads(body))
            self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self.server.uploads.append(self.path.rpartition("/")[2])
        self._answer({})

    def _query(self, request: dict[str, Any]) -> dict[str, Any]:
        query, given = request["query"], request["variables"]
        if "upsertBucket" in query:
            if given.get("config"):
                self.server.configs.append(json.loads(given["config"]))
            project = {"id": "p", "name": "avatarl-env", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": given.get("name"), "displayName": "x", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            url = f"{self.server.url}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any]) -> None:
        if self.server.refuses_keys:
            content = {"errors": [{"message": "user is not logged in"}], "data": None}
        data = json.dumps(content).encode()
        self.send_response(401 if self.server.refuses_keys else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: If it is not so in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
