"""The report's page served while a run goes on: to this machine alone, and to be read alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from switchkd.errors import UserError
from switchkd.report.page import as_json, page, policy

HOST = "127.0.0.1"


class FollowServer(ThreadingHTTPServer):
    """Serves the page at / and its data at /data.json, made again whenever one of its files has changed.

    It listens on 127.0.0.1 alone, takes GET alone, and answers only those who call it by that name or as localhost: a page from
    elsewhere whose name was bent to this address is refused. Raises UserError where the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, gather: Callable[[], Mapping[str, Any]], files: Callable[[], list[Path]]) -> None:
        self.gather = gather
        self.files = files
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be had ({error}); give another with --port, or 0 for any") from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    @property
    def hosts(self) -> set[str]:
        """The names that it answers to."""
        return {f"{name}:{self.port}" for name in (HOST, "localhost")}

    def state(self) -> str:
        """A word that changes when a file does."""
        stats = [(str(path), path.stat()) for path in self.files()]
        text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


class _Handler(BaseHTTPRequestHandler):
    server: FollowServer
    server_version, sys_version = "switchkd", ""
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            # The page was closed.
            self.close_connection = True

    def parse_request(self) -> bool:
        """As in the base class; whatever is no GET from this machine's own page is refused before it is looked at."""
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET"})
        elif self.headers.get_all("Host", [])[1:] or self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        else:
            return True
        return False

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(page(self.server.gather()), "text/html; charset=utf-8")
        elif path == "/data.json":
            state = self.server.state()
            if self.headers.get("If-None-Match") == state:
                self._begin(HTTPStatus.NOT_MODIFIED, {"ETag": state})
            else:
                self._send(as_json(self.server.gather()), "application/json", {"ETag": state})
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _refuse(self, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> None:
        # A body that may follow is not read.
        self.close_connection = True
        self._begin(status, {"Content-Length": "0", "Connection": "close", **(headers or {})})

    def _send(self, text: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
        body = text.encode()
        self._begin(HTTPStatus.OK, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _begin(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        always = {
            "Content-Security-Policy": f"{policy(follow=True)}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        self.send_response(status)
        for name, value in {**always, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the page asks every few seconds."""
