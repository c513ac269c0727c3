"""A teacher on a server of vLLM's: what it says of finished texts, by `prompt_logprobs` of its completions.

Nothing that the server sends is trusted: every id and number is checked before it reaches the loss.

Shape letters: T counted tokens of a text, K ids kept, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from switchkd.data.collate import response_ids
from switchkd.errors import UserError
from switchkd.models.pair import PROBES
from switchkd.records import Example, Prompt, Rollout, TopLogp
from switchkd.serving.connection import Connection, Refused
from switchkd.web import check_encrypted

KEY_ENV = "SWITCHKD_TEACHER_KEY"
_COMPLETIONS, _MODELS, _TOKENIZE = "/v1/completions", "/v1/models", "/tokenize"
# A server of vLLM's fills its batches itself, from all requests that it has.
_TEXTS_A_REQUEST, _REQUESTS_IN_FLIGHT = 8, 8
# vLLM writes this for -inf, which JSON cannot say.
_EXCLUDED = -9999.0
# Over 152k ids a log-softmax of float32 is off by 1.5e-5 (shaping.py); other faults, such as logits, are far larger.
_ROUNDING = 1e-3
_LONGEST_NAME = 200
_REMEDY = "a divergence compares id with id: serve a teacher of the student's family"


def is_address(name: object) -> bool:
    """Whether a teacher's name is the address of a server."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


class RemoteTeacher:
    """The teacher at an address such as http://host:8000, or http://host:8000#NAME where the server has several models.

    It says the likeliest `top_k` ids at each position. `vocabulary_size` and `tokenizer` are the student's. The key, if the
    server wants one, is in SWITCHKD_TEACHER_KEY. A request that gets no answer is sent again, see `Connection`. On being made
    it scores a text of two tokens, and compares the tokenizers where the server has a /tokenize. Raises UserError for an address,
    a model or a vocabulary that does not fit, and for a key that would go over a network unencrypted; Unreachable where the server
    is gone.
    """

    def __init__(
        self,
        address: str,
        top_k: int,
        vocabulary_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        retries: int = 4,
        timeout: float = 600.0,
    ) -> None:
        url, _, name = address.partition("#")
        self._server = Connection(url.rstrip("/").removesuffix("/v1"), KEY_ENV, retries=retries, timeout=timeout)
        check_encrypted(url, KEY_ENV, "use https or a tunnel")
        self.url = self._server.url
        self.vocabulary_size = vocabulary_size
        self.top_k = min(top_k, vocabulary_size)
        self.name, self.positions = self._model(name)
        self._check_scores()
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)

    def _model(self, name: str) -> tuple[str, int | None]:
        """The name of the model that is asked, and its number of positions where the server says it."""
        try:
            listed = self._server.json(_MODELS).get("data")
        except Refused as refused:
            remedy = f"set ${KEY_ENV} to its key" if refused.status in (401, 403) else "check the address"
            raise UserError(f"{refused}; {remedy}") from None
        models = {each["id"]: each for each in listed if _is_model(each)} if isinstance(listed, list) else {}
        if not models:
            raise self._wrong("lists no models")
        if name not in models and (name or len(models) > 1):
            reason = f"has no model {name!r}" if name else f"has {len(models)} models"
            raise UserError(f"{self.url} {reason}; name one of {', '.join(models)}, as {self.url}#{next(iter(models))}")
        found = models[name] if name else next(iter(models.values()))
        limit = found.get("max_model_len")
        return found["id"], limit if isinstance(limit, int) and limit > 0 else None

    def _check_scores(self) -> None:
        """Score the student's first and last token, so that a vocabulary that ends elsewhere shows itself."""
        last = self.vocabulary_size - 1
        try:
            self._read([Example(Prompt((0,), 0), (last,))])
        except Refused as refused:
            if "logprobs" in str(refused):
                raise UserError(
                    f"{refused}; a server of vLLM's says 20 ids at most, unless it is started with --max-logprobs "
                    f"{self.top_k}: start it so, or lower teacher_signal.top_k"
                ) from None
            raise UserError(
                f"{refused}; it was asked for a text of the student's first and last token, 0 and {last}: {_REMEDY}"
            ) from None

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError where the server's tokenizer splits a text otherwise than the student's."""
        for text in PROBES:
            asked = {"model": self.name, "prompt": text, "add_special_tokens": False}
            try:
                theirs = self._server.json(_TOKENIZE, asked).get("tokens")
            except Refused:
                # Not every server has it, and nothing else tells.
                return
            ours = tokenizer.encode(text, add_special_tokens=False)
            if theirs != ours:
                raise UserError(
                    f"the tokenizers of the student and of {self.name} at {self.url} differ: {text!r} becomes "
                    f"{ours[:8]} and {str(theirs)[:80]}; {_REMEDY}"
                )

    def check_room(self, tokens: int) -> None:
        """Raise UserError where a text of `tokens`, prompt and response together, is too long for the server."""
        # It has to write one token of its own behind each text.
        if self.positions is not None and tokens >= self.positions:
            raise UserError(
                f"prompt and response come to {tokens} tokens, but {self.url} reads {self.positions - 1} at most; start it with a "
                f"larger --max-model-len, or lower max_new_tokens or max_prompt_tokens"
            )

    def read(self, sequences: Sequence[Example | Rollout]) -> list[Example | Rollout]:
        """The sequences, each with what the teacher says of its response: `teacher_top`, and a rollout's `teacher_logp`.

        Both are at temperature 1. A few requests are in flight at a time. Raises UserError for an answer that is wrong, and
        Unreachable where the server is gone.
        """
        parts = [sequences[at : at + _TEXTS_A_REQUEST] for at in range(0, len(sequences), _TEXTS_A_REQUEST)]
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            return [each for part in pool.map(self._read, parts) for each in part]

    def _read(self, sequences: Sequence[Example | Rollout]) -> list[Example | Rollout]:
        texts = [[*each.prompt.token_ids, *response_ids(each)] for each in sequences]
        # An empty response stands in where a process has no rows, and nothing is asked of it.
        asked = [row for row, each in enumerate(sequences) if response_ids(each)]
        said = dict(zip(asked, self._said_of([texts[row] for row in asked]) if asked else [], strict=True))
        return [
            self._with_teacher(each, texts[row], said.get(row, [None] * len(texts[row])))
            for row, each in enumerate(sequences)
        ]

    def _said_of(self, texts: Sequence[list[int]]) -> Iterator[list[Any]]:
        """What the server says at each position of each text."""
        asked = {"model": self.name, "prompt": texts, "prompt_logprobs": self.top_k, "max_tokens": 1, "temperature": 0}
        choices = self._server.json(_COMPLETIONS, asked).get("choices")
        by_index = (
            {each.get("index"): each for each in choices if isinstance(each, dict)} if isinstance(choices, list) else {}
        )
        for row, text in enumerate(texts):
            said = by_index.get(row, {}).get("prompt_logprobs")
            if not isinstance(said, list) or len(said) != len(text):
                raise self._wrong(f"says nothing of each token of text {row}")
            yield said

    def _with_teacher(self, sequence: Example | Rollout, text: list[int], said: list[Any]) -> Example | Rollout:
        prompt, response = sequence.prompt, response_ids(sequence)
        begun = prompt.begun if prompt.trains_beginning else 0
        counted = range(len(prompt.token_ids) - begun, len(text)) if response else range(0)
        # Nothing predicts the first token of a text.
        columns = [self._position(said[at], text[at]) for at in counted if at]
        top = self._top(columns)
        if isinstance(sequence, Rollout):
            logp = tuple(each.token_logp for each in columns[-len(response) :])
            return replace(sequence, teacher_top=top, teacher_logp=logp)
        return replace(sequence, teacher_top=top)

    def _position(self, said: Any, token_id: int) -> _Position:
        """What the server says at a position: the likeliest ids, and the token that stands there, whatever its rank."""
        if not isinstance(said, dict) or not self.top_k <= len(said) <= self.top_k + 1:
            raise self._wrong(f"does not say {self.top_k} ids at each position")
        found = {self._id(key): self._logp(value) for key, value in said.items()}
        if token_id not in found or len(found) < len(said):
            raise self._wrong(f"says nothing of token {token_id} where it stands, or one id twice")
        ordered = sorted(found, key=lambda each: (-found[each], each))[: self.top_k]
        # What is left, where the token is none of the likeliest, has its mass at least.
        beyond = -math.inf if token_id in ordered else found[token_id]
        return _Position(ordered, [found[each] for each in ordered], found[token_id], beyond)

    def _id(self, key: str) -> int:
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token_id < self.vocabulary_size:
            raise self._wrong(
                f"has token id {key[:20]!r} among the likeliest, but the student knows ids below {self.vocabulary_size}",
                f"{_REMEDY}; of one that has a few more ids than the student, lower teacher_signal.top_k",
            )
        return token_id

    def _logp(self, value: Any) -> float:
        logp = value.get("logprob") if isinstance(value, dict) else None
        if not isinstance(logp, int | float) or isinstance(logp, bool) or not logp <= _ROUNDING:
            raise self._wrong(f"has {str(logp)[:20]} where a log-probability has to be")
        return -math.inf if logp <= _EXCLUDED else float(min(logp, 0.0))

    def _top(self, columns: Sequence[_Position]) -> TopLogp:
        """The columns as one record. Raises UserError where the probabilities are those of no distribution."""
        shape = len(columns), self.top_k
        logp = torch.tensor([each.logp for each in columns], dtype=torch.float64).reshape(shape)
        mass = logp.exp().sum(dim=-1)
        # The likeliest K of V ids hold K / V at least; a server's model may have some more ids than the student.
        least = 0.5 * self.top_k / self.vocabulary_size
        if wrong := [each for each in mass.tolist() if not least <= each <= 1 + _ROUNDING]:
            raise self._wrong(
                f"says {self.top_k} likeliest ids of probability {wrong[0]:.4g} together",
                "start it without --logprobs-mode, so that it says log-probabilities",
            )
        beyond = torch.tensor([each.beyond for each in columns], dtype=torch.float64)
        ids = torch.tensor([each.ids for each in columns], dtype=torch.int64).reshape(shape)
        return TopLogp(ids, logp.float(), self._rest(logp, mass, beyond).float())

    def _rest(self, logp: Tensor, mass: Tensor, beyond: Tensor) -> Tensor:
        """The log-probability (T,) of all other ids together."""
        others = self.vocabulary_size - self.top_k
        if not others or not len(mass):
            return torch.full_like(mass, -torch.inf)
        # Rounding leaves a small one without a digit, but none of the others is likelier than the last of the kept ones.
        most = torch.maximum(others * logp[:, -1].exp(), beyond.exp())
        return torch.clamp(1 - mass, min=beyond.exp(), max=most).log()

    def _wrong(self, what: str, remedy: str = "check that it is a server of vLLM's") -> UserError:
        return UserError(f"the answer of {self.url} {what}; {remedy}")


class _Position(NamedTuple):
    """The likeliest ids and their log-probabilities, that of the token there, and again if it is none of them, or else -inf."""

    ids: list[int]
    logp: list[float]
    token_logp: float
    beyond: float


def _is_model(value: Any) -> bool:
    name = value.get("id") if isinstance(value, Mapping) else None
    # It is shown to people, in terminals too.
    return isinstance(name, str) and name.isprintable() and 0 < len(name) <= _LONGEST_NAME
