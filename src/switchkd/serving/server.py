"""A server of rollouts: vLLM with a pair, asked over HTTP by `RemoteVllm`. One client's call at a time, as a trainer asks.

What comes in is checked: sizes first, then JSON by `call_of`, or safetensors, which hold numbers alone. Nothing is unpickled,
imported or run for a client.
"""

from __future__ import annotations

import hmac
import json
import tempfile
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from switchkd.errors import UserError
from switchkd.records import Prompt
from switchkd.serving.call import Backend, Call, call_of
from switchkd.web import is_loopback

# The format of what crosses; a client of another one is refused.
PROTOCOL = 1
ROLLOUTS, WEIGHTS, STATE = "/v1/rollouts", "/v1/weights", "/v1/state"
KEY_ENV = "SWITCHKD_SERVE_KEY"
MORE_WEIGHTS = "start switchkd serve with a larger --weights-gib"
# A million tokens of prompts are about 8 MB.
_MOST_JSON = 64_000_000
# Seconds that a client may be silent in the middle of a request.
_PATIENCE = 60
_PIECE = 1 << 20
_JSON = "application/json"


class Served(Backend, Protocol):
    """A backend that knows the version of its weights."""

    version: int


class RolloutServer(HTTPServer):
    """Serves a backend. Beyond this machine only with a key, `key`, that each request then has to bring.

    `most_weights` bounds the bytes of new weights. Raises UserError where the address is open and no key is set, or is taken.
    """

    def __init__(self, backend: Served, host: str, port: int, *, key: str = "", most_weights: int = 1 << 34) -> None:
        self.backend = backend
        self.key = key
        self.most_weights = most_weights
        self.host = host
        if not key and not is_loopback(host):
            raise UserError(f"host is {host}, which others can reach; set {KEY_ENV} to a secret, or serve on 127.0.0.1")
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}:{port} cannot be had ({error}); give another port, or 0 for any") from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: RolloutServer
    server_version, sys_version = "switchkd", ""
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE
    # Bytes of the request that have not been read.
    unread = 0

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == STATE:
            backend, most = self.server.backend, self.server.most_weights
            started = {} if backend.started is None else backend.started.to_json()
            state = {"protocol": PROTOCOL, "version": backend.version, "most_weights": most}
            self._json(HTTPStatus.OK, state | started)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        handlers = {ROLLOUTS: (self._rollouts, _MOST_JSON), WEIGHTS: (self._weights, self.server.most_weights)}
        length = self.headers.get("Content-Length", "")
        has_length = length.isascii() and length.isdigit() and len(length) < 16
        self.unread = int(length) if has_length else 0
        if not self._allowed():
            return
        if self.path not in handlers:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
            return
        handle, most = handlers[self.path]
        if not has_length:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say how long the request is")
        elif self.unread > most:
            remedy = MORE_WEIGHTS if self.path == WEIGHTS else "ask for fewer rollouts at a time"
            said = f"the request has {length} bytes; at most {most} are taken; {remedy}"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, said)
        else:
            try:
                body, kind = handle()
            except UserError as error:
                self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            except Exception as error:
                # Whoever runs the server sees all of it, and the client what it is about.
                self.server.handle_error(self.request, self.client_address)
                self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            else:
                self._send(HTTPStatus.OK, body, kind)

    def _allowed(self) -> bool:
        """Whether the client is who may ask; if not, it has been told."""
        key, given = self.server.key, self.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            self._refuse(HTTPStatus.UNAUTHORIZED, f"the key is missing or wrong; set {KEY_ENV}")
        elif not key and self.headers.get("Host") not in {f"{each}:{self.server.port}" for each in self._names()}:
            # A page in a browser whose name was bent to this address.
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "ask this server by the address that it listens on")
        elif self.headers.get("Origin") is not None:
            self._refuse(HTTPStatus.FORBIDDEN, "this server is not for pages in a browser")
        else:
            return True
        return False

    def _names(self) -> set[str]:
        return {self.server.host, "localhost", "127.0.0.1", "[::1]"}

    def _body(self, most: int) -> bytes:
        """Up to `most` bytes of what has not been read."""
        piece = self.rfile.read(min(self.unread, most))
        self.unread = self.unread - len(piece) if piece else 0
        return piece

    def _rollouts(self) -> tuple[bytes, str]:
        call, prompts, seed = request_of(self._body(_MOST_JSON))
        return save(dict(self.server.backend.rollouts(prompts, call, seed))), "application/octet-stream"

    def _weights(self) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory(prefix="switchkd-serve-") as folder:
            path = Path(folder) / "weights.safetensors"
            with path.open("wb") as file:
                while self.unread:
                    file.write(self._body(_PIECE))
            try:
                with safe_open(path, framework="pt") as weights:
                    names = list(weights.keys())
            except SafetensorError as error:
                raise UserError(f"the weights are no safetensors file ({error})") from error
            if not names:
                raise UserError("the weights are none at all")
            return json.dumps({"version": self.server.backend.load(path)}).encode(), _JSON

    def _json(self, status: HTTPStatus, value: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), _JSON)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        if self.unread <= _PIECE:
            # Closed on a request that is half read, a connection may lose the answer.
            self._body(_PIECE)
        self._json(status, {"error": reason})

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        # One client at a time: none that stays connected keeps the others out.
        self.close_connection = True
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a trainer asks twice a step."""


def request_to(call: Call, prompts: list[Prompt], seed: int) -> bytes:
    """The text of a request; `request_of` reads it."""
    rows = [[list(each.token_ids), each.prompt_id, each.sample_id, each.begun] for each in prompts]
    return json.dumps({"protocol": PROTOCOL, "call": call.to_json(), "seed": seed, "prompts": rows}).encode()


def request_of(text: bytes) -> tuple[Call, list[Prompt], int]:
    """The call, the prompts and the seed of a request. Raises UserError for what is none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is no JSON ({error})") from error
    if not isinstance(given, dict) or given.get("protocol") != PROTOCOL:
        raise UserError(f"this server speaks protocol {PROTOCOL}; install the same switchkd on both sides")
    call, seed, rows = given.get("call"), given.get("seed"), given.get("prompts")
    if (
        not isinstance(call, str)
        or not isinstance(seed, int)
        or not isinstance(rows, list)
        or not (rows and _is_int(seed))
    ):
        raise UserError("the request lacks a call, a seed or prompts")
    return call_of(call), [_prompt(row) for row in rows], seed


def _prompt(row: Any) -> Prompt:
    if not isinstance(row, list) or len(row) != 4 or not isinstance(row[0], list) or not all(map(_is_int, row[1:])):
        raise UserError("a prompt is [[token ids], prompt id, sample id, tokens begun]")
    if not all(map(_is_int, row[0])):
        raise UserError("a prompt's token ids are whole numbers")
    return Prompt(tuple(row[0]), *row[1:])


def _is_int(value: Any) -> bool:
    # What addresses are made of, and what vLLM carries.
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
