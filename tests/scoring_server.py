"""A server that answers as vLLM 0.32 does: its models, its tokenizer, and the prompt_logprobs of its completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sockets import running


class ScoringServer(ThreadingHTTPServer):
    """Serves the model `name`. `fault` may take a place and its request, and give (status, answer) in place of ours."""

    daemon_threads = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, max_logprobs: int = 20
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.max_logprobs = model, tokenizer, max_logprobs
        self.names = ["teacher"]
        self.max_model_len = 512
        self.key = ""
        self.asked: list[tuple[str, Any]] = []
        self.fault: Callable[[str, Any], tuple[int, Any] | None] = lambda place, asked: None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def completions(self) -> list[Any]:
        return [asked for place, asked in self.asked if place == "/v1/completions"]

    def answer(self, place: str, asked: Any) -> tuple[int, Any]:
        with self._lock:
            self.asked.append((place, asked))
            if (found := self.fault(place, asked)) is not None:
                return found
            if place == "/v1/models":
                return 200, {
                    "data": [
                        {"id": name, "object": "model", "max_model_len": self.max_model_len} for name in self.names
                    ]
                }
            if place == "/tokenize" and self.tokenizer is not None:
                ids = self.tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
                return 200, {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids}
            if place != "/v1/completions":
                return 404, {"detail": "Not Found"}
            return self._completions(asked)

    def _completions(self, asked: Any) -> tuple[int, Any]:
        top_k, vocabulary = asked["prompt_logprobs"], self.model.config.vocab_size
        if asked["max_tokens"] < 1:
            return _refused("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)")
        if top_k > self.max_logprobs:
            return _refused(
                f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.max_logprobs} "
                f"(parameter=prompt_logprobs, value={top_k})"
            )
        for text in asked["prompt"]:
            if max(text) >= vocabulary:
                return _refused(f"Token id {max(text)} is out of vocabulary")
            if len(text) >= self.max_model_len:
                return _refused(f"This model's maximum context length is {self.max_model_len} tokens.")
        choices = [
            {"index": index, "text": "x", "prompt_logprobs": prompt_logprobs(self.model, text, top_k)}
            for index, text in enumerate(asked["prompt"])
        ]
        # The order is nobody's promise.
        return 200, {"object": "text_completion", "model": asked["model"], "choices": choices[::-1]}


def prompt_logprobs(model: PreTrainedModel, text: list[int], top_k: int) -> list[Any]:
    """As vLLM says it: the token that stands there first, whatever its rank, then the likeliest; nothing of the first one."""
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(input_ids=torch.tensor([text])).logits[0].float(), dim=-1)
    said: list[Any] = [None]
    for logp_V, token in zip(logp_TV[:-1], text[1:], strict=True):
        ids = dict.fromkeys([token, *logp_V.topk(top_k).indices.tolist()])
        said.append(
            {
                str(each): {
                    "logprob": max(float(logp_V[each]), -9999.0),
                    "rank": int((logp_V >= logp_V[each]).sum()),
                    "decoded_token": f"w{each}",
                }
                for each in ids
            }
        )
    return said


def _refused(message: str) -> tuple[int, Any]:
    return 400, {"error": {"message": message, "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}}


class _Handler(BaseHTTPRequestHandler):
    server: ScoringServer

    def do_GET(self) -> None:
        self._send(*self._allowed(None))

    def do_POST(self) -> None:
        self._send(*self._allowed(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def _allowed(self, asked: Any) -> tuple[int, Any]:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return 401, {"error": f"Unauthorized, not {self.headers.get('Authorization')}"}
        return self.server.answer(self.path, asked)

    def _send(self, status: int, answer: Any) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def scoring(model: PreTrainedModel, *given: Any, **options: Any) -> AbstractContextManager[ScoringServer]:
    """A running server."""
    return running(ScoringServer(model, *given, **options))
