"""Requests to a server over HTTP: asked again where it does not answer, and its refusals in its own words."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from switchkd.errors import Unreachable, UserError
from switchkd.web import NoRedirect, key_in, without_key

# A reply of a million tokens with 64 ids each is under a gigabyte.
_MOST_BYTES = 1 << 31
# Busy for a moment, as every status from 500 on.
_PASSING = (408, 425, 429)


class Connection:
    """A server's address. Its key, if it wants one, is in the environment variable `key_env`, and kept nowhere.

    A request that gets no answer is sent again after 1, 2, 4, ... seconds, `retries` times, so it has to give the same whenever
    it is sent; it may take up to `timeout` seconds. May be used by several threads. Raises UserError for an address that is none.
    """

    def __init__(self, url: str, key_env: str, *, retries: int = 4, timeout: float = 3600.0) -> None:
        if not _is_address(url):
            raise UserError(f"url is {url!r}; give the address of a server, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.key_env = key_env
        self.retries = retries
        self.timeout = timeout
        # No proxy: such a server is on this machine or beside it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)

    def json(self, place: str, body: Mapping[str, Any] | Path | None = None) -> dict[str, Any]:
        """The mapping that the server answers with, {} for other JSON; a body that is a mapping is sent as JSON.

        Raises as `ask` does, and UserError for an answer that is no JSON.
        """
        if isinstance(body, Path):
            answer = self.ask(place, body, "application/octet-stream")
        else:
            answer = self.ask(place, None if body is None else json.dumps(body).encode())
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the answer of {self.url} is no JSON ({error}); check the address") from error
        return found if isinstance(found, dict) else {}

    def ask(self, place: str, body: bytes | Path | None, kind: str = "application/json") -> bytes:
        """The answer's body. Raises Refused where the server refuses, Unreachable where it does not answer."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                return self._ask_once(place, body, kind)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code < 500 and error.code not in _PASSING:
                        raise Refused(f"{self.url} refuses: {self._reason(error)}", error.code) from None
                    reason = self._reason(error)
            except (OSError, http.client.HTTPException) as error:
                # URLError says the same twice.
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise Unreachable(
            f"the server at {self.url} does not answer ({reason}), {self.retries + 1} times; start it again"
        )

    def _ask_once(self, place: str, body: bytes | Path | None, kind: str) -> bytes:
        headers = {"Content-Type": kind}
        stream: IO[bytes] | None = None
        if isinstance(body, Path):
            headers["Content-Length"] = str(body.stat().st_size)
            stream = body.open("rb")
        try:
            data: Any = body if stream is None else stream
            request = urllib.request.Request(self.url + place, data=data, headers=headers)
            if key := key_in(self.key_env):
                request.add_unredirected_header("Authorization", f"Bearer {key}")
            with self._opener.open(request, timeout=self.timeout) as response:
                found: bytes = response.read(_MOST_BYTES + 1)
                if len(found) > _MOST_BYTES:
                    raise UserError(
                        f"the answer of {self.url} has more than {_MOST_BYTES} bytes; ask for less at a time"
                    )
                if response.length:
                    # Of an answer that breaks off `read` returns the beginning, as if it were whole.
                    raise http.client.IncompleteRead(found, response.length)
                return found
        finally:
            if stream is not None:
                stream.close()

    def _reason(self, error: urllib.error.HTTPError) -> str:
        try:
            said = json.loads(error.read(10_000))["error"]
            # Ours is a sentence; OpenAI's form has it inside.
            said = str(said["message"] if isinstance(said, dict) else said)
        except (ValueError, KeyError, TypeError, OSError, RecursionError, http.client.HTTPException):
            return f"error {error.code}"
        shown = "".join(c if c.isprintable() else " " for c in said)
        return without_key(" ".join(shown.split()), key_in(self.key_env))[:500]


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and not (parts.username or parts.query)
            and parts.port != 0
        )
    except ValueError:
        # Such as a port that is no number.
        return False


class Refused(UserError):  # noqa: N818 - as the errors of a person's making
    """A server refuses a request, in its own words; `status` is that of HTTP."""

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.status = status
