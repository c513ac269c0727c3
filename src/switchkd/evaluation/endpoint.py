"""Chat completions from an OpenAI-compatible endpoint: one request, retried while that can help, and never over a budget."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from switchkd.errors import UserError
from switchkd.web import check_encrypted, key_in, opener, without_key

KEY_ENV = "OPENAI_API_KEY"
# A server that is busy, or was for a moment.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# What a server refuses for what is asked: too long a text, or one that its filter keeps out.
_OF_THIS_REQUEST = (400, 413, 422)
# A server that says 429 until somebody pays.
_QUOTA = "insufficient_quota"
_LONGEST_WAIT = 60.0
# A reply is a few thousand characters; whoever sends this much is no judge.
_MOST_BYTES = 10_000_000
# Of a refusal: bytes that are read, and characters that are shown.
_MOST_SAID, _SHOWN = 20_000, 300


class NoMoreRequests(UserError):  # noqa: N818 - nothing went wrong
    """The budget is spent, or somebody asked to stop; what was answered before is kept."""


class RefusedRequestError(UserError):
    """The endpoint takes no request such as this one; others it may take."""


@dataclass(frozen=True)
class Reply:
    """The text of a completion, and the tokens that the endpoint counted for it (0 where it counts none)."""

    text: str
    tokens: int


@dataclass
class Budget:
    """How much may still be asked: requests, every retry among them, and tokens as the endpoint counts them (None: any number).

    Shared by threads. `stop` ends waits at once.
    """

    max_requests: int
    max_tokens: int | None = None
    requests: int = 0
    tokens: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> None:
        """Count a request before it is sent; raises NoMoreRequests when the budget is used up."""
        with self._lock:
            if self.stop.is_set():
                raise NoMoreRequests("stopped")
            if self.requests >= self.max_requests:
                raise NoMoreRequests(f"the budget of {self.max_requests} requests is spent; raise --max-requests")
            if self.max_tokens is not None and self.tokens >= self.max_tokens:
                raise NoMoreRequests(f"the budget of {self.max_tokens} tokens is spent; raise --max-total-tokens")
            self.requests += 1

    def used(self, tokens: int) -> None:
        """Count the tokens of a reply."""
        with self._lock:
            self.tokens += tokens


@dataclass(frozen=True)
class ChatEndpoint:
    """An endpoint of chat completions, such as https://api.openai.com/v1, and the model that is asked there.

    The key is read from the environment variable `key_env` whenever a request is sent, and kept nowhere. Without the variable
    none is sent, as local servers take it. `body` goes over the request's own keys; None removes one. `timeout` and
    `first_wait` are seconds; the wait doubles from attempt to attempt, up to a minute. Raises UserError for a URL that is
    none, and for one that would send a key unencrypted over a network.
    """

    url: str
    model: str
    key_env: str = KEY_ENV
    body: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 6
    timeout: float = 120.0
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username or address.query:
            raise UserError(f"the endpoint {self.url!r} is no URL such as https://api.openai.com/v1; correct it")
        check_encrypted(self.url, self.key_env, "use https, or name a variable that is not set with --key-env")

    def _key(self) -> str:
        return key_in(self.key_env)

    def request(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The body of a request: all that an answer depends on."""
        own = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": 512}
        return {key: value for key, value in {**own, **self.body}.items() if value is not None}

    def ask(self, messages: Sequence[Mapping[str, str]], budget: Budget) -> Reply:
        """The endpoint's reply. Raises UserError where it refuses or stays out of reach, NoMoreRequests at the budget's end.

        The error is a RefusedRequestError where another request might be taken.
        """
        problem, asked = "", 0.0
        for attempt in range(self.attempts):
            if attempt and budget.stop.wait(asked + self._wait(1 if asked else attempt)):
                raise NoMoreRequests("stopped")
            budget.take()
            try:
                reply = self._reply(self._sent(self.request(messages)))
            except urllib.error.HTTPError as error:
                with error:
                    said = self._said(error)
                    problem = f"{error.code} {said[:_SHOWN]}"
                    if error.code in _OF_THIS_REQUEST:
                        raise RefusedRequestError(self._refusal(error.code, problem)) from None
                    if error.code not in _PASSING or _QUOTA in said:
                        raise UserError(self._refusal(error.code, problem)) from None
                    asked = _asked_wait(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # Of URLError, a time-out, a connection that was cut, and a reply that is no JSON.
                problem, asked = self._hidden(str(error) or type(error).__name__)[:_SHOWN], 0.0
            else:
                budget.used(reply.tokens)
                return reply
        raise UserError(
            f"{self.url} gave no reply in {self.attempts} attempts, the last time: {problem}; try again later"
        )

    def _wait(self, attempt: int) -> float:
        # At random, so that threads that were refused together do not come back together.
        return min(_LONGEST_WAIT, self.first_wait * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)

    def _sent(self, body: Mapping[str, Any]) -> bytes:
        place = self.url.rstrip("/")
        place = place if place.endswith("/chat/completions") else f"{place}/chat/completions"
        request = urllib.request.Request(place, data=json.dumps(body).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        if key := self._key():
            # Unredirected: never part of what a redirect takes along.
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with opener(place).open(request, timeout=self.timeout) as response:
            text: bytes = response.read(_MOST_BYTES)
            return text

    def _reply(self, body: bytes) -> Reply:
        try:
            values = json.loads(body)
            text = values["choices"][0]["message"]["content"]
            tokens = (values.get("usage") or {}).get("total_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            # Some answer with an error under code 200.
            raise ValueError(
                f"the reply is no chat completion: {_one_line(body[:_MOST_SAID].decode('utf-8', 'replace'))}"
            ) from None
        # A reply cut off before its first word has no content.
        return Reply(self._hidden(str(text or "")), tokens if isinstance(tokens, int) else 0)

    def _hidden(self, text: str) -> str:
        return without_key(text, self._key())

    def _said(self, error: urllib.error.HTTPError) -> str:
        """What the server says of its refusal, on one line, without the key."""
        try:
            text = error.read(_MOST_SAID).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        # Before it is shortened: a key cut in two would not be found.
        return _one_line(self._hidden(text or str(error.reason)))

    def _refusal(self, code: int, problem: str) -> str:
        if 300 <= code < 400:
            return f"{self.url} sends requests on to another place ({code}), where a key must not follow; give that URL itself"
        if code in (401, 403):
            return f"{self.url} refused the key in ${self.key_env or '(none)'} ({problem}); set the variable to a valid key"
        return f"{self.url} refused the request ({problem}); check --url and --model, and set other keys with --body"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _asked_wait(error: urllib.error.HTTPError) -> float:
    """The seconds that a server asks to wait, at most a minute; 0 where it asks for none."""
    asked = str(error.headers.get("Retry-After") or "")
    return min(_LONGEST_WAIT, float(asked)) if asked.isascii() and asked.isdigit() else 0.0
