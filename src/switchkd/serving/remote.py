"""The client of `switchkd serve`: what `ColocatedVllm` does here, asked of a server; again where it does not answer."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from switchkd.errors import Unreachable, UserError
from switchkd.records import Prompt
from switchkd.serving.call import Call
from switchkd.serving.server import PROTOCOL, ROLLOUTS, STATE, WEIGHTS, request_to, serve_key

# A reply of a million tokens with 64 ids each is under a gigabyte.
_MOST_BYTES = 1 << 31


class RemoteVllm:
    """A server of `switchkd serve`. The key, if it wants one, is in SWITCHKD_SERVE_KEY.

    A request that gets no answer is sent again after 1, 2, 4, ... seconds, `retries` times; it gives the same tokens. A call may
    take up to `timeout` seconds. Raises UserError for an address that is none, and Unreachable where the server is gone.
    """

    def __init__(self, url: str, *, retries: int = 4, timeout: float = 3600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url is {url!r}; give the address of a server, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.retries = retries
        self.timeout = timeout
        # No proxy: a server of rollouts is on this machine or beside it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._check()

    def _check(self) -> None:
        found = self._json(STATE)
        if found.get("protocol") != PROTOCOL:
            raise UserError(
                f"{self.url} speaks protocol {found.get('protocol')}, not {PROTOCOL}; install one switchkd on both"
            )

    def rollouts(
        self, prompts: Sequence[Prompt], call: Call, seed: int, on_progress: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """See `Backend`. `on_progress` is told once, at the end."""
        body = self._ask(ROLLOUTS, request_to(call, list(prompts), seed), "application/json")
        try:
            answer = load(body)
        except SafetensorError as error:
            raise UserError(
                f"the answer of {self.url} cannot be read ({error}); is it a server of switchkd?"
            ) from error
        if on_progress:
            on_progress(len(prompts))
        return answer

    def load(self, path: Path) -> int:
        """See `Backend`."""
        version = self._json(WEIGHTS, path).get("version")
        if not isinstance(version, int):
            raise UserError(f"{self.url} did not say which version its weights are; is it a server of switchkd?")
        return version

    def _json(self, place: str, body: Path | None = None) -> dict[str, Any]:
        answer = self._ask(place, body, "application/octet-stream")
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise UserError(f"the answer of {self.url} is no JSON ({error}); is it a server of switchkd?") from error
        return found if isinstance(found, dict) else {}

    def _ask(self, place: str, body: bytes | Path | None, kind: str) -> bytes:
        """The answer's body. Raises UserError with the server's words where it refuses, Unreachable where it does not answer."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                return self._ask_once(place, body, kind)
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise UserError(f"{self.url} refuses: {_reason(error)}") from error
                reason = f"error {error.code}"
            except (OSError, http.client.HTTPException) as error:
                # URLError says the same twice.
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise Unreachable(
            f"the server at {self.url} does not answer ({reason}), {self.retries + 1} times; start it again"
        )

    def _ask_once(self, place: str, body: bytes | Path | None, kind: str) -> bytes:
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {key}"} if (key := serve_key()) else {})
        stream: IO[bytes] | None = None
        if isinstance(body, Path):
            headers["Content-Length"] = str(body.stat().st_size)
            stream = body.open("rb")
        try:
            data: Any = body if stream is None else stream
            request = urllib.request.Request(self.url + place, data=data, headers=headers)
            with self._opener.open(request, timeout=self.timeout) as response:
                found: bytes = response.read(_MOST_BYTES + 1)
                if len(found) > _MOST_BYTES:
                    raise UserError(
                        f"the answer of {self.url} has more than {_MOST_BYTES} bytes; ask for fewer rollouts"
                    )
                return found
        finally:
            if stream is not None:
                stream.close()


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read(10_000))
        return str(said["error"])[:500]
    except (ValueError, KeyError, TypeError, OSError):
        return f"error {error.code}"
