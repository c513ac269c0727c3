"""Rollouts as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.files import write_atomically
from switchkd.records import Rollout
from switchkd.rollout.second_reading import Favorites, SecondReading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECODED_AT_ONCE = 32


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text that each token adds to the decoded ones before it; together they are the whole text, blanks included.

    A character of several tokens belongs to the token that completes it; the others add nothing.
    """
    # Decoded from `start` on: from the first token each time, a long response would take minutes.
    start, shown = 0, ""

    def decoded_until(end: int) -> str:
        return str(tokenizer.decode(list(token_ids[start:end]), clean_up_tokenization_spaces=False))

    for count in range(1, len(token_ids) + 1):
        decoded = decoded_until(count)
        # The replacement character: the next token may complete a character that this one began.
        if decoded.endswith("\ufffd") and count < len(token_ids):
            yield ""
            continue
        yield decoded[len(shown) :]
        shown = decoded
        if count - start >= _DECODED_AT_ONCE:
            # A few tokens before it, since a tokenizer may write a text's first token in another way.
            start = count - 4
            shown = decoded_until(count)


class _Vocabulary:
    """The text of a token apart from its place: with the blank before it, which decoding it alone might drop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.before = list(tokenizer.encode("a", add_special_tokens=False))
        self.known: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        if token_id not in self.known:
            *_, self.known[token_id] = token_texts([*self.before, token_id], self.tokenizer)
        return self.known[token_id]


def rollout_record(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, reading: SecondReading | None = None
) -> dict[str, Any]:
    """The rollout as JSON values: its texts and the fields of `Rollout`, with one list entry per token.

    `texts` is what each token adds to the response. `teacher` is there where a run has several. With a second `reading`,
    `student_favorites` and `teacher_favorites` are added, and what no teacher said when the rollout was written. JSON has no NaN
    (no teacher, or no threshold) and no -inf (a model excludes the token): both become null.
    """
    texts = {
        name: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        for name, ids in (("prompt", rollout.prompt.token_ids), ("response", rollout.token_ids))
    }
    numbers = {
        name: _json_numbers(getattr(rollout, name))
        for name in ("divergence", "threshold", "student_logp", "teacher_logp", "law_logp", "teacher_part", "margin")
        if getattr(rollout, name)
    }
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "sample_id": rollout.prompt.sample_id,
        **({"teacher": rollout.prompt.teacher} if rollout.prompt.teacher else {}),
        **texts,
        "finish_reason": str(rollout.finish_reason),
        "teacher_share": rollout.teacher_share,
        "prompt_token_ids": list(rollout.prompt.token_ids),
        "token_ids": list(rollout.token_ids),
        "tokens": tokenizer.convert_ids_to_tokens(list(rollout.token_ids)),
        "texts": list(token_texts(rollout.token_ids, tokenizer)),
        "written_by_teacher": list(rollout.written_by_teacher),
        **numbers,
        **({} if reading is None else _reading_record(rollout, reading, _Vocabulary(tokenizer))),
    }


def _json_numbers(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _reading_record(rollout: Rollout, reading: SecondReading, vocabulary: _Vocabulary) -> dict[str, Any]:
    record: dict[str, Any] = {"student_favorites": _favorites_record(reading.student, vocabulary)}
    if reading.teacher is None:
        return record
    record["teacher_favorites"] = _favorites_record(reading.teacher, vocabulary)
    if all(map(math.isnan, rollout.divergence)):
        record["divergence"] = _json_numbers(reading.divergence)
        record["teacher_logp"] = _json_numbers(reading.teacher.logp)
    return record


def _favorites_record(favorites: Favorites, vocabulary: _Vocabulary) -> dict[str, Any]:
    return {
        "token_ids": favorites.ids,
        "texts": [[vocabulary.text(token_id) for token_id in ids] for ids in favorites.ids],
        # To be read by people: at full length these would be half of the line.
        "logp": [
            [None if value is None else round(value, 4) for value in _json_numbers(row)] for row in favorites.ids_logp
        ],
    }


def write_rollouts(
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    readings: Sequence[SecondReading] = (),
) -> None:
    """Write one line per rollout, atomically: the whole file or none. `readings` are of the first rollouts."""
    padded = [*readings, *[None] * (len(rollouts) - len(readings))]
    records = [rollout_record(each, tokenizer, read) for each, read in zip(rollouts, padded, strict=True)]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
