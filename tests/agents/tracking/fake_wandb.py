"""As much of a Weights & Biases server, on loopback, as the real client needs to finish a run.

As a program: makes a run for each of `FAULTS` in the current folder, and prints what the server
received of each, as JSON.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agents.tracking import wandb as wandb_sink
from agents.tracking.writer import Clock, MetricWriter, RunFolder

TIMEOUT = 2.0  # seconds, of start and end alike
KEY = "x" * 40
FAULTS = ("none", "network lost", "no account", "unknown key", "dead host")


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
    """Wait until a condition holds, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def run(fault: str) -> dict[str, Any]:
    """Write six rows; return what the server received and how long it took."""
    server = FakeServer(refuses_keys=fault == "unknown key")
    if fault == "dead host":
        server.die()
    key = "" if fault == "no account" else KEY
    os.environ |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": key}
    start = time.monotonic()
    with MetricWriter(RunFolder(fault), config={"seed": 3}, track="online") as writer:
        for n in range(6):
            if fault == "network lost" and n == 3:
                wait_for(lambda: server.streams)  # it has begun to send
                server.die()
            clock = Clock(phase="joint", update=n, operation=0, forward_tokens=n, seconds=0.0)
            writer.write("grpo", clock, {"grpo/loss": n / 2})
        writer.write_summary({"seconds": 1.0})
    seconds = time.monotonic() - start
    server.die()
    return {
        "seconds": seconds,
        "history": server.history,
        "configs": server.configs,
        "exit_codes": server.exit_codes,
        "uploads": server.uploads,
    }


if __name__ == "__main__":
    import wandb

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    wandb_sink.INIT_TIMEOUT = wandb_sink.FINISH_TIMEOUT = TIMEOUT
    found = {}
    for each in FAULTS:
        sys.stderr.write(f"== {each}\n")
        sys.stderr.flush()
        found[each] = run(each)
        wandb.teardown()  # so that it reads the variables again
    sys.stdout.write(json.dumps(found))
