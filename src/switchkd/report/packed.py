"""Rollouts as the report's page reads them: small, and checked, since a file of rollouts may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

# Probabilities are whole ten-thousandths.
PARTS = 10_000


class PackedRollout(TypedDict):
    """One rollout. `texts` and the favorites' first numbers are places in the table of strings.

    `by_teacher` has a 0 or a 1 for each token. `divergence` and `threshold` are in nats, `student_p` and `teacher_p` the
    probabilities of the written tokens; None where nothing was recorded. `*_favorites` has a list for each token: place,
    probability in ten-thousandths, and so on, the likeliest first. Equal `prompt_key`: the same prompt.
    """

    run: int
    stage: str
    step: int | None
    followed: bool
    prompt: str
    prompt_key: int
    prompt_id: int
    sample_id: int
    ended: str
    share: float
    mean_divergence: float | None
    texts: list[int]
    by_teacher: str
    divergence: list[float | None]
    threshold: list[float | None]
    student_p: list[float | None]
    teacher_p: list[float | None]
    student_favorites: list[list[int]]
    teacher_favorites: list[list[int]]


@dataclass
class Packer:
    """Packs rollouts that share one table of strings. `left_out` counts the lines that are no rollouts."""

    strings: list[str] = field(default_factory=list)
    left_out: int = 0
    _places: dict[str, int] = field(default_factory=dict)
    _prompts: dict[str, int] = field(default_factory=dict)

    def pack(self, record: Mapping[str, Any], run: int) -> PackedRollout | None:
        """A line of rollouts.jsonl, or None for one that does not hold what it has to."""
        try:
            return self._packed(record, run)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            self.left_out += 1
            return None

    def _packed(self, record: Mapping[str, Any], run: int) -> PackedRollout:
        by_teacher = [bool(each) for each in record["written_by_teacher"]]
        # Files of earlier versions hold the tokens alone, as the tokenizer writes them.
        texts = [str(each) for each in record.get("texts") or record["tokens"]]
        count = len(by_teacher)
        if count == 0 or len(texts) != count:
            raise ValueError("a rollout has as many texts as tokens, and at least one")
        divergence = _numbers(record.get("divergence"), count, 4)
        known = [value for value in divergence if value is not None]
        prompt, step = str(record["prompt"]), record.get("step")
        return {
            "run": run,
            "stage": str(record.get("stage") or ""),
            "step": None if step is None else int(step),
            "followed": record.get("followed") is True,
            "prompt": prompt,
            "prompt_key": self._prompts.setdefault(prompt, len(self._prompts)),
            "prompt_id": int(record.get("prompt_id", 0)),
            "sample_id": int(record.get("sample_id", 0)),
            "ended": str(record.get("finish_reason", "")),
            "share": round(_share(record, by_teacher), 4),
            "mean_divergence": round(math.fsum(known) / len(known), 4) if known else None,
            "texts": [self._place(text) for text in texts],
            "by_teacher": "".join("1" if each else "0" for each in by_teacher),
            "divergence": divergence,
            "threshold": _numbers(record.get("threshold"), count, 6),
            "student_p": _probabilities(record.get("student_logp"), count),
            "teacher_p": _probabilities(record.get("teacher_logp"), count),
            "student_favorites": self._favorites(record.get("student_favorites"), count),
            "teacher_favorites": self._favorites(record.get("teacher_favorites"), count),
        }

    def _place(self, text: str) -> int:
        place = self._places.setdefault(text, len(self.strings))
        if place == len(self.strings):
            self.strings.append(text)
        return place

    def _favorites(self, record: Mapping[str, Any] | None, count: int) -> list[list[int]]:
        if not record:
            return []
        packed = []
        for texts, logps in zip(record["texts"], record["logp"], strict=True):
            # A token that the model excludes is no favorite of its.
            row = [(str(text), logp) for text, logp in zip(texts, logps, strict=True) if logp is not None]
            packed.append([each for text, logp in row for each in (self._place(text), round(PARTS * _p(logp)))])
        if len(packed) != count:
            raise ValueError("there are favorites for each token or for none")
        return packed


def _share(record: Mapping[str, Any], by_teacher: Sequence[bool]) -> float:
    """The recorded share, which of a blend is a mean over its coins, or that of the tokens."""
    share = float(record.get("teacher_share", math.nan))
    return share if 0 <= share <= 1 else sum(by_teacher) / len(by_teacher)


def _numbers(values: Any, count: int, digits: int) -> list[float | None]:
    """Numbers, rounded to `digits` after the point, None where one is unknown; empty if all are."""
    found = [
        None if value is None or not math.isfinite(value) else round(float(value), digits) for value in values or ()
    ]
    if found and len(found) != count:
        raise ValueError("there is a number for each token or for none")
    return found if any(value is not None for value in found) else []


def _probabilities(logps: Any, count: int) -> list[float | None]:
    return [None if logp is None else round(_p(logp), 4) for logp in _numbers(logps, count, 6)]


def _p(logp: float) -> float:
    return math.exp(min(0.0, logp))
